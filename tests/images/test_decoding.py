"""Images of every kind become the pixels that torchvision would give, or a named error."""

from __future__ import annotations

import contextlib
import io
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import noise, saved, square
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import ImageError
from repvgg_deploy.images.decoding import DecodingOptions, crop_image, decode_image, normalize, read_pixels


def test_rgb_png_is_read_as_it_is(tmp_path: Path) -> None:
    pixels = noise(5, 7)
    assert np.array_equal(decode_image(saved(Image.fromarray(pixels), tmp_path / "a.png")), pixels)


def test_grayscale_is_repeated_in_three_channels(tmp_path: Path) -> None:
    gray = noise(5, 7, 1)
    decoded = np.asarray(decode_image(saved(Image.fromarray(gray), tmp_path / "a.png")))
    assert np.array_equal(decoded, np.stack([gray] * 3, axis=-1))


def test_black_and_white_becomes_0_and_255(tmp_path: Path) -> None:
    bits = noise(8, 8, 1) > 127
    decoded = np.asarray(decode_image(saved(Image.fromarray(bits), tmp_path / "a.png")))
    assert np.array_equal(decoded[..., 0], bits * 255)


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = np.asarray(decode_image(saved(image, tmp_path / "a.jpg")))
    assert np.abs(decoded.astype(int) - (255, 0, 0)).max() < 8


def test_palette_with_transparency_gives_its_colours_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    path = saved(image, tmp_path / "a.png", transparency=bytes([0, 128]))
    with Image.open(path) as written:
        assert written.mode == "P"
    assert np.array_equal(np.asarray(decode_image(path)), np.full((4, 4, 3), (10, 200, 30)))


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    pixels = noise(6, 6, 4)
    decoded = decode_image(saved(Image.fromarray(pixels, "RGBA"), tmp_path / "a.png"))
    assert np.array_equal(decoded, pixels[..., :3])


def test_gray_with_alpha_is_read(tmp_path: Path) -> None:
    pixels = noise(6, 6, 2)
    decoded = np.asarray(decode_image(saved(Image.fromarray(pixels, "LA"), tmp_path / "a.png")))
    assert np.array_equal(decoded[..., 1], pixels[..., 0])


def test_16_bit_png_is_scaled_to_8_bits_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 1000, 32896, 65535]], np.uint16)
    decoded = np.asarray(decode_image(saved(Image.fromarray(deep), tmp_path / "a.png")))
    assert decoded[0, :, 0].tolist() == [0, 1, 4, 128, 255]


def test_dark_16_bit_png_stays_dark(tmp_path: Path) -> None:
    deep = np.full((2, 2), 200, np.uint16)
    assert np.asarray(decode_image(saved(Image.fromarray(deep), tmp_path / "a.png"))).max() == 1


def test_float_tiff_with_nan_is_read_without_a_warning(tmp_path: Path) -> None:
    values = np.array([[0, 100.4, 300, np.nan, -5, np.inf]], np.float32)
    decoded = np.asarray(decode_image(saved(Image.fromarray(values), tmp_path / "a.tiff")))
    assert decoded[0, :, 0].tolist() == [0, 100, 255, 0, 0, 255]


def test_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(path))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda p: np.rot90(p)),
    ],
)
def test_exif_orientation_is_obeyed(orientation, turn, tmp_path: Path) -> None:
    pixels = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode_image(path), turn(pixels))


def test_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"there is no image .*gone\.jpg"):
        decode_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF0000WEBP"])
def test_file_that_is_no_image_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.jpg is (not an image that can be read|damaged)"):
        decode_image(path)


def test_directory_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is damaged"):
        decode_image(tmp_path)


FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    Image.fromarray(noise(24, 20)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 1), changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4))
def test_damaged_image_gives_pixels_or_an_image_error(kind, share, changes, tmp_path: Path) -> None:
    content = bytearray(encoded(kind))
    for place, value in changes:
        content[int(place**2 * len(content))] = value
    path = tmp_path / "a.img"
    path.write_bytes(content[: int(share * len(content))] if share < 0.9 else content)
    with contextlib.suppress(ImageError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_image(path).mode == "RGB"
    with contextlib.suppress(ImageError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_pixels(path, square(16)).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_truncated_image_is_damaged_not_gray_below(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(encoded(kind)[: len(encoded(kind)) * 2 // 3])
    with pytest.raises(ImageError, match="is damaged"):
        decode_image(path)


# (width, height), resize → (width, height): torchvision takes int(resize · long / short) for the long side.
RESIZED = [
    ((500, 375), 256, (341, 256)),
    ((375, 500), 256, (256, 341)),
    ((333, 500), 256, (256, 384)),
    ((100, 100), 256, (256, 256)),
    ((256, 300), 256, (256, 300)),
    ((97, 101), 64, (64, 66)),
    ((1, 3), 8, (8, 24)),
]


@pytest.mark.parametrize(("size", "resize", "expected"), RESIZED)
def test_short_side_is_resized_and_the_long_one_rounded_down(size, resize, expected) -> None:
    image = Image.fromarray(noise(size[1], size[0]))
    width, height = expected
    # A crop of just that size leaves the resized image as it is.
    cropped = crop_image(image, Preprocessing(height=height, width=width, resize=resize))
    assert np.array_equal(cropped, image.resize(expected, Image.Resampling.BILINEAR))


# (width, height) of the image, the crop, and the crop's left and top edge: round half to even of half the rest.
CROPPED = [
    ((341, 256), 224, (58, 16)),
    ((256, 341), 224, (16, 58)),
    ((256, 384), 224, (16, 80)),
    ((11, 8), 8, (2, 0)),
    ((13, 8), 8, (2, 0)),
    ((9, 8), 8, (0, 0)),
    ((15, 8), 8, (4, 0)),
]


@pytest.mark.parametrize(("size", "crop", "edge"), CROPPED)
def test_crop_is_at_the_centre_with_torchvisions_rounding(size, crop, edge) -> None:
    pixels = noise(size[1], size[0])
    left, top = edge
    cropped = np.asarray(crop_image(Image.fromarray(pixels), square(crop, min(size))))
    assert np.array_equal(cropped, pixels[top : top + crop, left : left + crop])


@pytest.mark.parametrize(("size", "crop", "padding"), [(8, 9, 0), (8, 10, 1), (8, 11, 1), (8, 12, 2), (8, 15, 3)])
def test_crop_larger_than_the_image_is_black_outside_with_torchvisions_rounding(size, crop, padding) -> None:
    pixels = noise(size, size) | 1
    cropped = np.asarray(crop_image(Image.fromarray(pixels), square(crop, size)))
    inside = (slice(padding, padding + size),) * 2
    assert cropped.shape == (crop, crop, 3)
    assert np.array_equal(cropped[inside], pixels)
    assert cropped.sum() == pixels.sum()


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2, 3)])
def test_tiny_images_are_read(size: tuple[int, int], tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.full((size[1], size[0], 3), 77, np.uint8)), tmp_path / "a.png")
    assert np.array_equal(read_pixels(path, square(32, 36)), np.full((32, 32, 3), 77))


def test_of_an_extreme_aspect_ratio_only_the_crop_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The whole image at the crop's scale would be 256 x 2,560,000 pixels: 2 GB.
    image = Image.fromarray(noise(20_000, 2))
    sizes, resize = [], Image.Image.resize

    def record(self: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", record)
    assert crop_image(image, square(224, 256)).size == (224, 224)
    assert sizes == [(224, 224)]


@pytest.mark.parametrize(("height", "width"), [(330, 20), (20, 330), (340, 21)])
def test_extreme_aspect_ratio_gives_the_pixels_that_resizing_the_whole_image_would(height: int, width: int) -> None:
    image = Image.fromarray(noise(height, width))
    long = int(24 * max(height, width) / min(height, width))
    whole = image.resize((24, long) if height > width else (long, 24), Image.Resampling.BILINEAR)
    edge = round((long - 20) / 2)
    box = (2, edge, 22, edge + 20) if height > width else (edge, 2, edge + 20, 22)
    cropped = np.asarray(crop_image(image, square(20, 24)), dtype=int)
    assert np.abs(cropped - np.asarray(whole.crop(box))).max() <= 1


def test_extreme_aspect_ratio_shows_the_centre() -> None:
    pixels = np.zeros((3001, 1, 3), np.uint8)
    pixels[1500] = 255
    cropped = np.asarray(crop_image(Image.fromarray(pixels), square(64)))
    assert cropped[31:33].min() > 240
    assert np.array_equal(cropped, cropped[::-1])


def test_normalizing_is_x_over_255_minus_mean_over_std() -> None:
    pixels = noise(4, 4)[None]
    preprocessing = Preprocessing(height=4, width=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    expected = (pixels / 255.0 - preprocessing.mean) / preprocessing.std
    result = normalize(pixels, preprocessing)
    assert result.dtype == np.float32
    assert np.allclose(result, expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_one_mean_takes_the_luma_of_rgb() -> None:
    pixels = np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]]], np.uint8)
    result = normalize(pixels, Preprocessing(mean=(0.0,), std=(1.0,)))
    assert result.shape == (1, 1, 1, 4)
    assert np.rint(result * 255).ravel().tolist() == [76, 150, 29, 255]


@pytest.mark.parametrize("kind", ["PPM", "JPEG2000", "EPS", "TGA", "ICO"])
def test_formats_that_few_have_looked_at_are_not_decoded(kind: str, tmp_path: Path) -> None:
    # By its content: an EPS called photo.jpg would start Ghostscript.
    path = tmp_path / "photo.jpg"
    Image.fromarray(noise(24, 20)).save(path, kind)
    with pytest.raises(
        ImageError, match=r"photo\.jpg is not an image that can be read \(JPEG, PNG, WEBP, TIFF, BMP, GIF\)"
    ):
        decode_image(path)


def test_decoded_size_is_bounded_before_anything_is_decoded(tmp_path: Path) -> None:
    path = saved(Image.fromarray(noise(100, 100)), tmp_path / "a.png")
    read_pixels(path, square(8), DecodingOptions(max_bytes=40_000))
    with pytest.raises(ImageError, match=r"a\.png is too large \(100 x 100 pixels"):
        read_pixels(path, square(8), DecodingOptions(max_bytes=39_999))


@pytest.mark.parametrize(
    "error", [RuntimeError("codec"), MemoryError(), NotImplementedError("no"), SyntaxError("bad"), KeyError(3)]
)
def test_whatever_a_decoder_raises_is_about_the_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(Image.fromarray(noise(10, 10)), tmp_path / "a.png")

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(ImageError, match=r"a\.png is damaged"):
        decode_image(path)


@pytest.mark.slow
def test_large_16_bit_png_is_converted_without_copies_in_float(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (3000, 2000), dtype=np.uint16)
    path = saved(Image.fromarray(deep), tmp_path / "a.png", compress_level=1)
    tracemalloc.start()
    converted = decode_image(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The file, and strips of a megapixel; one copy of the whole in float64 would be 48 MB, and there were several.
    assert peak < 48e6
    assert np.array_equal(np.asarray(converted)[..., 0], np.rint(deep / 257.0).astype(np.uint8))


def test_bytes_are_decoded_as_their_file_is(tmp_path: Path) -> None:
    path = saved(Image.fromarray(noise(30, 40)), tmp_path / "a.png")
    assert np.array_equal(read_pixels(path.read_bytes(), square(16)), read_pixels(path, square(16)))


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("size", [(40, 30), (400, 20)])
def test_images_are_resized_with_the_filter_asked_for(name, size, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    height = 12
    width = int(height * size[0] / size[1])
    expected = np.asarray(image.resize((width, height), Image.Resampling[name.upper()]))
    given = read_pixels(tmp_path / "image.png", Preprocessing(height, width, height, interpolation=name))
    # A long strip is resized by its crop, within rounding.
    assert np.abs(given.astype(int) - expected).max() <= (0 if max(size) < 16 * min(size) else 1)


def test_a_webp_image_counts_with_what_its_decoder_keeps(tmp_path: Path) -> None:
    path = saved(Image.fromarray(noise(32, 32)), tmp_path / "image.webp")
    assert decode_image(path, DecodingOptions(max_bytes=32 * 32 * 8)).size == (32, 32)
    with pytest.raises(ImageError, match="is too large"):
        decode_image(path, DecodingOptions(max_bytes=32 * 32 * 8 - 1))


def test_only_the_crop_is_computed_where_the_whole_image_would_be_resized_to_gigabytes(tmp_path: Path) -> None:
    pixels = noise(40, 60)
    path = saved(Image.fromarray(pixels), tmp_path / "image.png")
    for decoder in ("auto", "pillow"):
        options = DecodingOptions(decoder=decoder)
        given = read_pixels(path, Preprocessing(8, 8, 65536), options)
        # Some pixels around the middle one, enlarged beyond the crop.
        assert np.abs(given.astype(int) - pixels[19:21, 29:31].mean((0, 1))).max() <= 2


def test_a_bgr_net_gets_its_channels_in_that_order_and_a_gray_one_the_luma_of_rgb(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    bgr = read_pixels(tmp_path / "image.png", Preprocessing(8, 8, 8, color_order="bgr"))
    assert np.array_equal(bgr, pixels[..., ::-1])
    gray = Preprocessing(8, 8, 8, (0.5,), (0.5,), color_order="bgr")
    assert np.array_equal(read_pixels(tmp_path / "image.png", gray), pixels)


def test_gray_image_becomes_the_pixels_of_its_colour_copy(tmp_path: Path) -> None:
    gray = Image.fromarray(noise(50, 70, 1))
    path = saved(gray, tmp_path / "gray.png")
    expected = crop_image(gray.convert("RGB"), square(24, 30))
    assert np.array_equal(read_pixels(path, square(24, 30)), np.asarray(expected))
