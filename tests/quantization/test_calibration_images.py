"""Which images INT8 is calibrated on, and what is told of those that cannot be read."""

from __future__ import annotations

from pathlib import Path

from helpers.pictures import jpeg, write_tar

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.images.sources import Unreadable
from repvgg_deploy.quantization.calibration_images import choose_images, choose_sources


def folder_with_a_damaged_archive(tmp_path: Path) -> Path:
    archive = write_tar(tmp_path / "images.tar", {f"{number:03}.jpg": jpeg(number) for number in range(40)})
    archive.write_bytes(archive.read_bytes()[:-10_240])
    return tmp_path


def test_an_archive_that_ends_early_is_told_of_whichever_images_are_drawn(tmp_path: Path) -> None:
    folder = folder_with_a_damaged_archive(tmp_path)
    for seed in range(5):
        *drawn, last = choose_sources(folder, 4, seed)
        assert isinstance(last, Unreadable)
        assert len(drawn) == 4
    images = choose_images(folder, 4, 0, Preprocessing(32, 32, 32))
    assert sum(len(batch) for batch in images) == 4
    (reason,) = images.broken.reasons.values()
    assert "no end marker" in reason


def test_the_choice_depends_on_the_names_and_the_seed_only(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.jpg").touch()
    first, again, other = (choose_sources(tmp_path, 5, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert list(first) == sorted(first, key=str)
    assert len(choose_sources(tmp_path, 50, 0)) == 20
