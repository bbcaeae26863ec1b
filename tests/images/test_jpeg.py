"""The quick way to the pixels of a JPEG file against Pillow's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import noise, square
from PIL import Image

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import ImageError
from repvgg_deploy.images import jpeg
from repvgg_deploy.images.decoding import DecodingOptions, crop_image, crop_pixels, read_pixels

PILLOW = DecodingOptions(decoder="pillow")
needs_simplejpeg = pytest.mark.skipif(jpeg.find_simplejpeg() is None, reason="simplejpeg is not installed")


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def furthest(first: np.ndarray, second: np.ndarray) -> int:
    assert first.shape == second.shape
    return int(np.abs(first.astype(int) - second).max())


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise at several scales, as hard for a resize as a photograph is, and harder."""
    image = Image.fromarray(noise(height, width, seed=seed))
    coarse = Image.fromarray(noise(7, 9, seed=seed + 1)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(coarse, image, 0.3)


SIZES = [(500, 375), (220, 530), (97, 101), (64, 64), (1200, 900), (40, 300)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preprocessing", [square(224, 256), square(64), Preprocessing(96, 128, 140), square(40, 32)])
def test_resized_bytes_are_within_2_of_pillows(size: tuple[int, int], preprocessing: Preprocessing) -> None:
    image = photograph(*size)
    ours = crop_pixels(np.array(image), preprocessing)
    assert furthest(ours, np.asarray(crop_image(image, preprocessing))) <= 2


@needs_simplejpeg
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}]
)
def test_decoded_pixels_are_pillows(mode: str, options: dict[str, object]) -> None:
    data = encoded(photograph(101, 67).convert(mode), **options)
    # A crop of the whole image: nothing is resized.
    whole = Preprocessing(67, 101, 67)
    assert np.array_equal(read_pixels(data, whole), read_pixels(data, whole, PILLOW))


@needs_simplejpeg
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(48, 32), exif=exif)
    assert furthest(read_pixels(data, square(24)), read_pixels(data, square(24), PILLOW)) <= 2


@needs_simplejpeg
def test_photographs_are_within_2_of_pillow(shared: Path) -> None:
    for path in sorted((shared / "data" / "photos").glob("*.JPEG"))[::4]:
        assert furthest(read_pixels(path, square(224, 256)), read_pixels(path, square(224, 256), PILLOW)) <= 2


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.97])
def test_truncated_file_is_damaged_for_both(keep: float) -> None:
    data = encoded(photograph(200, 150))
    for options in (DecodingOptions(), PILLOW):
        with pytest.raises(ImageError, match="is damaged"):
            read_pixels(data[: int(keep * len(data))], square(32), options)


def test_without_simplejpeg_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photograph(50, 40))
    monkeypatch.setattr(jpeg, "find_simplejpeg", lambda: None)
    assert np.array_equal(read_pixels(data, square(32)), read_pixels(data, square(32), PILLOW))
