"""What is in a tar archive, whole or damaged."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from helpers.pictures import tar_bytes, write_tar

from repvgg_deploy.errors import ImageError
from repvgg_deploy.images.archives import index_archive
from repvgg_deploy.images.sources import read_source

FILES = {"a.jpg": b"A" * 700, "folder/b.jpg": b"B" * 10, "empty.jpg": b"", "x" * 200 + ".jpg": b"long"}


def test_members_are_found_with_their_bytes(tmp_path: Path) -> None:
    index = index_archive(write_tar(tmp_path / "a.tar", FILES))
    assert {member.name: member.read() for member in index.members} == FILES
    assert list(index.members[0].name) == list("a.jpg")
    assert index.problem is None


def test_archive_inside_an_archive_is_read_in_place_one_level_deep(tmp_path: Path) -> None:
    innermost = tar_bytes({"deep.jpg": b"D"})
    inner = tar_bytes({**FILES, "deeper.tar": innermost})
    index = index_archive(write_tar(tmp_path / "a.tar", {"in.tar": inner, "z.jpg": b"Z"}))
    found = {member.name: member.read() for member in index.members}
    assert found == {
        **{f"in.tar/{name}": content for name, content in FILES.items()},
        "in.tar/deeper.tar": innermost,
        "z.jpg": b"Z",
    }


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, 1536, 2048, 2600])
def test_archive_that_ends_early_says_so_and_gives_what_there_is(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(FILES)[:keep])
    index = index_archive(path)
    assert index.problem is not None
    assert [member.name for member in index.members] == list(FILES)[: len(index.members)]


def test_pipe_is_no_archive_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert index_archive(tmp_path / "a.tar").problem == "not a regular file"


def test_damaged_header_is_not_the_end_of_the_archive(tmp_path: Path) -> None:
    content = bytearray(tar_bytes(FILES))
    place = content.index(b"folder/b.jpg")
    content[place : place + 4] = b"\xff\xff\xff\xff"
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    index = index_archive(path)
    assert [member.name for member in index.members] == ["a.jpg"]
    assert "no end marker" in str(index.problem)


def test_compressed_and_missing_archives_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(tar_bytes(FILES)))
    assert "uncompressed" in str(index_archive(path).problem)
    assert index_archive(tmp_path / "none.tar").problem == "No such file or directory"


@pytest.mark.parametrize("size", [b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7])
def test_a_size_that_no_file_has_is_damage(size: bytes, tmp_path: Path) -> None:
    content = bytearray(tar_bytes({"a/1.png": b"x" * 600, "a/2.png": b"y"}))
    content[124:136] = size
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "a.tar").write_bytes(content)
    index = index_archive(tmp_path / "a.tar")
    assert index.problem
    for member in index.members:
        with pytest.raises(ImageError):
            read_source(member, 1 << 80)
