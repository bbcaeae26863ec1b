"""Images and their classes in the layouts of ImageNet and WebDataset."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.pictures import jpeg, noise, saved, tar_bytes, write_tar
from PIL import Image

from repvgg_deploy.errors import ImageError
from repvgg_deploy.images.labelled import list_labelled_images
from repvgg_deploy.images.sources import read_source

VALIDATION = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)]


def test_classes_are_the_sorted_names_of_the_folders(image_folder: Path) -> None:
    (image_folder / ".cache").mkdir()
    (image_folder / ".cache" / "x.png").touch()
    found = list_labelled_images(image_folder)
    assert found.class_names == ("class0", "class1", "class2", "class3", "class4")
    assert found.labels == tuple(label for label in range(5) for _ in range(3))
    assert all(path.parent.name == f"class{label}" for path, label in zip(found.paths, found.labels, strict=True))


def test_images_without_class_folders_are_an_error(tmp_path: Path) -> None:
    saved(Image.fromarray(noise(3, 3)), tmp_path / "a.png")
    with pytest.raises(ImageError, match="no images in class folders"):
        list_labelled_images(tmp_path)


def test_inner_archives_are_the_classes_of_the_training_set(tmp_path: Path) -> None:
    inner = {name: tar_bytes({f"{name}_1.JPEG": jpeg(seed)}) for seed, name in enumerate(["n02", "n01"])}
    outer = write_tar(tmp_path / "train.tar", {f"{name}.tar": content for name, content in inner.items()})
    found = list_labelled_images(outer)
    assert found.class_names == ("n01", "n02")
    assert [str(path) for path in found.paths] == [f"{outer}/n02.tar/n02_1.JPEG", f"{outer}/n01.tar/n01_1.JPEG"]
    assert found.labels == (1, 0)
    assert [read_source(path, 1 << 20) for path in found.paths] == [jpeg(0), jpeg(1)]


def test_folder_of_one_archive_per_class(tmp_path: Path) -> None:
    for name in ("n02", "n01"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}_1.JPEG": jpeg(), f"{name}_2.JPEG": jpeg(1)})
    found = list_labelled_images(tmp_path)
    assert (found.class_names, found.labels) == (("n01", "n02"), (0, 0, 1, 1))


def test_folders_inside_an_archive_are_the_classes(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "val.tar", {"val/n02/a.jpg": jpeg(), "val/n01/b.jpg": jpeg()})
    found = list_labelled_images(archive)
    assert (found.class_names, found.labels) == (("n01", "n02"), (1, 0))


def test_shards_of_webdataset_have_their_labels_beside_the_images(tmp_path: Path) -> None:
    for shard in (0, 1):
        members = {
            f"{shard}{n}.{kind}": jpeg() if kind == "jpg" else b"%d" % (7 * shard + n)
            for n in (0, 1)
            for kind in ("cls", "jpg")
        }
        write_tar(tmp_path / f"val-{shard}.tar", members)
    found = list_labelled_images(tmp_path / "val-*.tar")
    assert (found.class_names, found.labels) == (None, (0, 1, 7, 8))


@pytest.mark.parametrize("index", [b"-3", b"x", b"", b"1.5", b"\xff", b"9" * 32, "²".encode()])
def test_index_that_no_class_has_is_an_error(index: bytes, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "val.tar", {"a.jpg": jpeg(), "a.cls": index})
    with pytest.raises(ImageError, match=r"a\.cls is not the index of a class"):
        list_labelled_images(archive)


def test_flat_archive_without_labels_is_an_error(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "val.tar", {name: jpeg() for name in VALIDATION})
    with pytest.raises(ImageError, match=r"_00000001\.JPEG has no class"):
        list_labelled_images(archive)


GROUND_TRUTHS = {
    "wnids in order": "n03\nn01\nn02\n",
    "names and wnids": "".join(f"{VALIDATION[i]} {wnid}\n" for i, wnid in ((2, "n02"), (0, "n03"), (1, "n01"))),
    "Kaggle": "ImageId,PredictionString\n"
    + "".join(f"{VALIDATION[i][:-5]},{wnid} 85 1 499 272 \n" for i, wnid in ((1, "n01"), (0, "n03"), (2, "n02"))),
}


@pytest.mark.parametrize("text", GROUND_TRUTHS.values(), ids=GROUND_TRUTHS)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_flat_validation_set_with_a_ground_truth(text: str, packed: bool, tmp_path: Path) -> None:
    source = tmp_path / "val"
    if packed:
        # The archive's own order is another one.
        source = write_tar(tmp_path / "val.tar", {name: jpeg() for name in reversed(VALIDATION)})
    else:
        source.mkdir()
        for name in VALIDATION:
            (source / name).write_bytes(jpeg())
    truth = tmp_path / "truth.txt"
    truth.write_text(text)
    found = list_labelled_images(source, truth)
    labels = {
        Path(str(path)).name: found.class_names[label] for path, label in zip(found.paths, found.labels, strict=True)
    }
    assert labels == dict(zip(VALIDATION, ["n03", "n01", "n02"], strict=True))
    assert found.class_names == ("n01", "n02", "n03")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for name in VALIDATION:
        (tmp_path / name).write_bytes(jpeg())
    return tmp_path


def test_numbers_from_0_are_the_models_own(flat: Path) -> None:
    truth = flat / "val.txt"
    truth.write_text("".join(f"{name} {index}\n" for name, index in zip(VALIDATION, (2, 0, 65), strict=True)))
    found = list_labelled_images(flat, truth)
    assert (found.class_names, found.labels) == (None, (2, 0, 65))


def test_numbers_of_the_development_kit_need_its_map(flat: Path) -> None:
    truth = flat / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("2\n1\n3\n")
    with pytest.raises(ImageError, match="numbers its classes from 1"):
        list_labelled_images(flat, truth)
    (flat / "map_clsloc.txt").write_text("n09 1 kit_fox\nn03 2 English_setter\nn05 3 husky\n")
    found = list_labelled_images(flat, truth)
    assert [found.class_names[label] for label in found.labels] == ["n03", "n09", "n05"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01\nn02\n", "has 2 lines, but there are 3 images"),
        (f"{VALIDATION[0]} 0\n", r"_00000002\.JPEG is not in"),
        ("", "is empty"),
    ],
)
def test_ground_truth_that_does_not_fit_is_an_error(text: str, message: str, flat: Path) -> None:
    truth = flat / "truth.txt"
    truth.write_text(text)
    with pytest.raises(ImageError, match=message):
        list_labelled_images(flat, truth)


def test_ground_truth_with_fields_that_no_line_has_is_an_error_or_made_of_names(flat: Path) -> None:
    truth = flat / "truth.txt"
    truth.write_text("x" * 200_000 + "\n")
    with pytest.raises(ImageError, match="cannot be read as a ground truth"):
        list_labelled_images(flat, truth)
    truth.write_text("".join(f"{name} {'9' * 5000}\n" for name in VALIDATION))
    assert list_labelled_images(flat, truth).class_names == ("9" * 5000,)


def test_archive_that_is_cut_off_is_named(tmp_path: Path) -> None:
    whole = tar_bytes({f"n0{n}/a.jpg": jpeg() for n in (1, 2, 3)})
    (tmp_path / "val.tar").write_bytes(whole[:3000])
    found = list_labelled_images(tmp_path / "val.tar")
    assert 1 <= len(found.paths) < 3
    assert [entry.path for entry in found.unreadable] == [tmp_path / "val.tar"]
