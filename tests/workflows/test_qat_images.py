"""The images of quantization-aware training: which of them are held out, and what is told of those left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.pictures import jpeg, write_tar
from PIL import Image

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import DeployError, ImageError
from repvgg_deploy.workflows import qat_images
from repvgg_deploy.workflows.qat_images import KnownClasses, TrainingImages, hold_out, read_training_images

SMALL = Preprocessing(8, 8, 8)
TWO = KnownClasses(2)


def numbered(count: int) -> TrainingImages:
    """Images of one pixel, which is their number."""
    return TrainingImages((), Preprocessing(), made=torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize(("count", "held"), [(128, 16), (1000, 125), (50_000, 128)])
def test_no_image_is_both_trained_on_and_held_out(count, held) -> None:
    split = hold_out(numbered(count))
    assert len(split.held_out) == held
    assert len(split) == count - held
    trained, labels = split.take(torch.arange(len(split)))
    assert labels is None
    assert sorted(torch.cat([trained, split.held_out]).flatten().tolist()) == list(range(count))
    # Of all classes, where the images come in their order.
    steps = split.held_out.flatten().diff()
    assert float(steps.max() - steps.min()) <= 1


def test_the_images_that_are_held_out_have_their_own_classes(tmp_path: Path) -> None:
    for label, grey in (("a", 0), ("b", 255)):
        (tmp_path / label).mkdir()
        for index in range(100):
            Image.new("L", (8, 8), grey).save(tmp_path / label / f"{index}.png")
    split = hold_out(read_training_images(tmp_path, SMALL, None, TWO))
    assert split.held_out_labels is not None
    assert split.held_out_labels.tolist() == (split.held_out.mean((1, 2, 3)) > 0).long().tolist()
    assert 0 < split.held_out_labels.float().mean() < 1
    assert hold_out(read_training_images(tmp_path, SMALL, None, None)).held_out_labels is None


@pytest.mark.parametrize("count", [1, 127])
def test_few_images_serve_both_purposes(count) -> None:
    split = hold_out(numbered(count))
    assert len(split) == len(split.held_out) == count


@pytest.mark.parametrize("labelled", [False, True])
def test_images_and_archives_that_cannot_be_read_are_left_out_by_name(tmp_path: Path, labelled: bool) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(3):
            (tmp_path / label / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "b" / "1.jpg").write_bytes(b"no image")
    archive = write_tar(tmp_path / "b" / "more.tar", {"x.jpg": jpeg(1)})
    # Its member is whole, and nothing follows it.
    archive.write_bytes(archive.read_bytes()[: 512 * (1 + -(-len(jpeg(1)) // 512))])
    images = read_training_images(tmp_path, SMALL, None, TWO if labelled else None)
    assert len(images) == 6
    assert images.labels is None or images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    damaged, broken = images.left_out
    assert "more.tar cannot be read" in damaged
    assert "1.jpg is not an image" in broken


def test_folder_with_nothing_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.tar").write_bytes(b"")
    with pytest.raises(ImageError, match=r"none of the images of .* can be read"):
        read_training_images(tmp_path / "a", SMALL, None, None)


def test_labels_are_the_classes_of_the_net_by_name(tmp_path: Path) -> None:
    for name, grey in (("cat", 0), ("dog", 255)):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), grey).save(tmp_path / name / "0.png")
    images = read_training_images(tmp_path, SMALL, None, KnownClasses(3, ("dog", "bird", "cat")))
    assert images.labels is not None
    assert images.labels.tolist() == [2, 0]
    # Names that the net does not know are in its order.
    assert read_training_images(tmp_path, SMALL, None, KnownClasses(2, ("0", "1"))).labels.tolist() == [0, 1]
    with pytest.raises(DeployError, match="the folder has 2 classes, but the model has 3"):
        read_training_images(tmp_path, SMALL, None, KnownClasses(3))


@pytest.mark.parametrize("index", [b"2", b"0"])
def test_numbers_of_classes_are_held_to_those_of_the_net(tmp_path: Path, index: bytes) -> None:
    archive = write_tar(tmp_path / "set.tar", {"a.jpg": jpeg(1), "a.cls": index})
    if index == b"0":
        assert read_training_images(archive, SMALL, None, TWO).labels.tolist() == [0]
        return
    with pytest.raises(DeployError, match="class 2, but the model's classes are 0 to 1"):
        read_training_images(archive, SMALL, None, TWO)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_broken_image_of_too_many_to_keep_gives_its_place_to_the_next(tmp_path, monkeypatch, labelled) -> None:
    monkeypatch.setattr(qat_images, "_KEPT_BYTES", 0)
    for label, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("L", (8, 8), 100 * label + 50 * number).save(tmp_path / name / f"{number}.png")
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    images = read_training_images(tmp_path, SMALL, None, TWO if labelled else None)
    assert images.kept is None
    pixels, labels = images.take(torch.tensor([0, 1, 2, 3, 1]))
    assert torch.equal(pixels[1], pixels[2])
    assert not torch.equal(pixels[0], pixels[1])
    assert labels is None or labels.tolist() == [0, 1, 1, 1, 1]
    (said,) = images.newly_broken()
    assert "1.png is not an image" in said
    assert images.newly_broken() == ()
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ImageError, match="none of the images can be read"):
        images.take(torch.tensor([3]))


def test_images_are_for_nets_of_one_or_three_channels(tmp_path) -> None:
    four = Preprocessing(8, 8, 8, mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(ImageError, match="images have 3 channels, but the net takes 4"):
        read_training_images(tmp_path, four, None, None)
