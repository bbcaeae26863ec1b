"""Batches of pixels, decoded ahead in threads."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import noise, saved, square
from PIL import Image

from repvgg_deploy.images.decoding import DecodingOptions, read_pixels
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.images.sources import list_images


@pytest.mark.parametrize("workers", [1, 3, None])
def test_batches_come_in_order_whoever_decodes(workers: int | None, image_folder: Path) -> None:
    paths = list_images(image_folder)
    batches = list(read_batches(paths, square(16), 4, BrokenImages(), DecodingOptions(workers)))
    assert [indices for _, indices in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14]]
    expected = np.stack([read_pixels(path, square(16)) for path in paths])
    assert np.array_equal(np.concatenate([pixels for pixels, _ in batches]), expected)


def test_broken_images_are_left_out_and_named(image_folder: Path) -> None:
    paths = list_images(image_folder)
    paths[1].write_bytes(b"no image")
    broken = BrokenImages()
    batches = list(read_batches(paths, square(16), 4, broken))
    assert [index for _, indices in batches for index in indices] == [0, *range(2, 15)]
    assert list(broken.reasons) == [paths[1]]
    assert str(paths[1]) in broken.reasons[paths[1]]


def test_decoding_stops_when_the_caller_does(image_folder: Path) -> None:
    before = threading.active_count()
    batches = read_batches(list_images(image_folder) * 50, square(16), 2, BrokenImages(), DecodingOptions(3))
    next(batches)
    batches.close()
    assert threading.active_count() == before


@pytest.mark.slow
def test_decoding_in_threads_leaves_the_warning_filters_as_they_were(image_folder: Path) -> None:
    before = list(warnings.filters)
    for _ in range(5):
        list(read_batches(list_images(image_folder) * 20, square(8), 8, BrokenImages(), DecodingOptions(8)))
    assert warnings.filters == before


def test_warnings_of_the_decoder_are_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.fromarray(noise(40, 40)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (pixels, _), *_ = read_batches([path], square(8), 1, BrokenImages())
    assert pixels.shape == (1, 8, 8, 3)


def test_decompression_bomb_is_a_damaged_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.fromarray(noise(40, 40)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    broken = BrokenImages()
    assert list(read_batches([path], square(8), 1, broken)) == []
    assert list(broken.reasons) == [path]
