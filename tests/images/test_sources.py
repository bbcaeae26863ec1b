"""Folders, lists, patterns and archives become images in an order of their own, and nothing is left out in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.pictures import jpeg, noise, saved, write_tar
from PIL import Image

from repvgg_deploy.errors import ImageError
from repvgg_deploy.images import sources
from repvgg_deploy.images.archives import TarMember
from repvgg_deploy.images.labelled import list_labelled_images
from repvgg_deploy.images.sources import Unreadable, find_images, list_images, read_source

ANY = 1 << 30


def test_folder_is_listed_sorted_at_any_depth_by_known_endings(tmp_path: Path) -> None:
    names = ["b/z.JPG", "a/1.png", "a/c/2.webp", "0.jpeg"]
    for name in [*names, "a/notes.txt", "b/z.jpg.part"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in list_images(tmp_path)] == [
        "0.jpeg",
        "a/1.png",
        "a/c/2.webp",
        "b/z.JPG",
    ]


def test_list_of_images_is_relative_to_itself_and_has_comments(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# chosen by hand\na/1.png\n\n  /x/2.png \n")
    assert list_images(path) == (tmp_path / "a/1.png", Path("/x/2.png"))


def test_single_image_is_a_list_of_one(tmp_path: Path) -> None:
    path = saved(Image.fromarray(noise(3, 3)), tmp_path / "a.png")
    assert list_images(path) == (path,)


def test_list_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "list.bin"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ImageError, match="is not a list of images"):
        list_images(path)


@pytest.mark.parametrize("listing", [list_images, list_labelled_images])
def test_missing_and_empty_folders_are_errors(listing, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no folder"):
        listing(tmp_path / "none")
    with pytest.raises(ImageError, match="no image"):
        listing(tmp_path)


def test_sources_keep_their_order_and_each_image_is_there_once(tmp_path: Path) -> None:
    b, a = (
        saved(Image.fromarray(noise(3, 3)), tmp_path / "b.png"),
        saved(Image.fromarray(noise(3, 3)), tmp_path / "a.png"),
    )
    assert find_images([b, tmp_path, a]) == (b, a)


def test_pattern_gives_what_it_matches_sorted(tmp_path: Path) -> None:
    for name in ("x/2.png", "x/1.png", "y/3.jpg", "y/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images([tmp_path / "*" / "*.png"]) == (tmp_path / "x/1.png", tmp_path / "x/2.png")
    assert len(find_images([tmp_path / "**" / "*"])) == 3
    with pytest.raises(ImageError, match="there is no image in"):
        find_images([tmp_path / "*.png"])


def test_members_of_an_archive_are_images_read_in_place(tmp_path: Path) -> None:
    files = {"b/1.jpg": jpeg(1), "a/2.JPG": jpeg(2), "a/notes.txt": b"no image"}
    archive = write_tar(tmp_path / "shard.tar", files)
    found = find_images([tmp_path])
    assert [str(image) for image in found] == [f"{archive}/b/1.jpg", f"{archive}/a/2.JPG"]
    assert [read_source(image, ANY) for image in found] == [jpeg(1), jpeg(2)]


def test_links_to_folders_are_followed_and_a_circle_of_them_ends(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    saved(Image.fromarray(noise(3, 3)), tmp_path / "real" / "a.png")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "circle").symlink_to(tmp_path / "all")
    assert find_images([tmp_path / "all"]) == (tmp_path / "all" / "link" / "a.png",)


def test_pattern_for_any_folders_enters_each_folder_once(tmp_path: Path) -> None:
    names = ["a/1.png", "a/b/2.jpg", "a/b/c/3.png", ".hidden/4.png", "a/.5.png", "a/b/notes.txt", "6.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link in ("one", "two"):
        (tmp_path / "a" / link).symlink_to(tmp_path)
    for pattern, matched in {
        "**/*.png": ["6.png", "a/1.png", "a/b/c/3.png"],
        "**": ["6.png", "a/1.png", "a/b/2.jpg", "a/b/c/3.png"],
        "a/**/?.*": ["a/1.png", "a/b/2.jpg", "a/b/c/3.png"],
        "?/**/c/*": ["a/b/c/3.png"],
        "**/b/**/*.png": ["a/b/c/3.png"],
        ".hidden/**": [".hidden/4.png"],
    }.items():
        assert [str(image) for image in find_images([tmp_path / pattern])] == [f"{tmp_path}/{name}" for name in matched]
    with pytest.raises(ImageError, match="there is no image in"):
        find_images([tmp_path / "**" / "*.webp"])


def test_link_to_a_folder_around_the_one_that_is_given_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for folder in (tmp_path, tmp_path / "set"):
        saved(Image.fromarray(noise(3, 3)), folder / "a.png")
    (tmp_path / "set" / "around").symlink_to(tmp_path)
    (tmp_path / "set" / "everything").symlink_to("/")
    assert find_images([tmp_path / "set"]) == (tmp_path / "set" / "a.png",)


def test_folder_of_very_many_folders_without_images_is_no_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        (tmp_path / f"class{number % 2}" / f"empty{number:02}").mkdir(parents=True)
    saved(Image.fromarray(noise(3, 3)), tmp_path / "class0" / "a.png")
    assert len(find_images([tmp_path])) == 1
    monkeypatch.setattr(sources, "_MOST_BARREN", 10)
    with pytest.raises(ImageError, match="more than 10 folders without an image") as raised:
        find_images([tmp_path])
    assert raised.value.hint == "give the folder of the images"
    # Classes are walked one by one, and counted together.
    with pytest.raises(ImageError, match="more than 10 folders without an image"):
        list_labelled_images(tmp_path)
    for number in range(12):
        saved(Image.fromarray(noise(3, 3)), tmp_path / f"class{number % 2}" / f"empty{number:02}" / "a.png")
    assert len(find_images([tmp_path])) == 13


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_folder_that_may_not_be_entered_is_named(tmp_path: Path) -> None:
    saved(Image.fromarray(noise(3, 3)), tmp_path / "a.png")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    try:
        assert find_images([tmp_path])[1] == Unreadable(closed, "Permission denied")
    finally:
        closed.chmod(0o700)


def test_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (unreadable,) = find_images([tmp_path])
    assert unreadable == Unreadable(tmp_path / "closed", "Permission denied")
    with pytest.raises(ImageError, match=r"closed cannot be read \(Permission denied\)"):
        read_source(unreadable, ANY)


def test_images_of_formats_that_are_not_decoded_are_listed_all_the_same(tmp_path: Path) -> None:
    saved(Image.fromarray(noise(3, 3)), tmp_path / "a.ppm")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    assert len(find_images([tmp_path])) == 2


def test_name_that_no_file_can_have_is_an_error(tmp_path: Path) -> None:
    for name in ("a\0b", "a\0*", "x" * 300, "y/" * 3000):
        with pytest.raises(ImageError) as raised:
            find_images([tmp_path / name])
        assert raised.value.hint


def test_pipe_is_no_image_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        read_source(tmp_path / "a.jpg", ANY)


def test_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(bytes(1001))
    with pytest.raises(ImageError, match=r"a\.jpg is too large \(1,001 bytes; at most 1,000 are read\)"):
        read_source(tmp_path / "a.jpg", 1000)


def test_archive_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", {"1.jpg": jpeg()})
    (image,) = find_images([archive])
    assert isinstance(image, TarMember)
    archive.write_bytes(archive.read_bytes()[: image.offset + 10])
    with pytest.raises(ImageError, match="the archive ends in the middle of it"):
        read_source(image, ANY)
