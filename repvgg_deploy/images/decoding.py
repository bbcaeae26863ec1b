"""Image files as pixels for a net: decode, resize, crop, normalize."""

from __future__ import annotations

import io
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import ImageError
from repvgg_deploy.images.jpeg import decode_jpeg, find_simplejpeg, resize_bilinear
from repvgg_deploy.images.sources import FORMATS, ImageSource, read_source

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DecodingOptions:
    """How images are decoded.

    Attributes:
        workers: threads that decode; by default one per core that may be used, at most 16.
        max_bytes: the most that one image may take in memory, decoded (four bytes per pixel, as Pillow stores RGB, or
            what its own format takes); no larger file is read either.
        decoder: `auto` takes simplejpeg for JPEG files where it is installed, `pillow` never does.
    """

    workers: int | None = None
    max_bytes: int = 512 << 20
    decoder: Literal["auto", "pillow"] = "auto"

    @property
    def library(self) -> str:
        """What decodes JPEG files: `simplejpeg` or `pillow`."""
        return "simplejpeg" if self.decoder == "auto" and find_simplejpeg() is not None else "pillow"


_DEFAULTS = DecodingOptions()
_LARGE_BYTES = 64 << 20
"""An image that takes more than this is decoded while no other such image is, however many threads there are."""

_one_large_image = threading.Lock()


def decode_image(source: ImageSource | bytes, options: DecodingOptions = _DEFAULTS) -> Image.Image:
    """The image in a file as 8-bit RGB, turned as its EXIF orientation says.

    Grayscale, palette, CMYK, alpha and 16-bit images are converted; of an animation the first frame is taken.

    Raises:
        ImageError: the file is not an image, a damaged or too large one, or of another format than `FORMATS`.
    """
    data, name = _read(source, options)
    with _open(data, name, options) as image:
        return _decode(image, name).convert("RGB")


ImageData = ImageSource | bytes | Pixels
"""An image file, its bytes, or pixels (H, W), (H, W, 1) or (H, W, 3)."""


def read_pixels(source: ImageData, preprocessing: Preprocessing, options: DecodingOptions = _DEFAULTS) -> Pixels:
    """The cropped image, uint8 (H, W, 3), channels in the order that the net takes; pixels that are given are RGB.

    Raises:
        ImageError: as `decode_image`, or pixels have another type or shape.
    """
    pixels = _read_rgb(source, preprocessing, options)
    # A net of one channel takes the luma, for which the pixels stay RGB.
    reverse = preprocessing.color_order == "bgr" and len(preprocessing.mean) == 3
    return np.ascontiguousarray(pixels[..., ::-1]) if reverse else pixels


def _read_rgb(source: ImageData, preprocessing: Preprocessing, options: DecodingOptions) -> Pixels:
    if isinstance(source, np.ndarray):
        return _crop_array(source, preprocessing, options)
    data, name = _read(source, options)
    with _open(data, name, options) as image:
        if options.decoder == "auto":
            with _memory(image):
                decoded = decode_jpeg(data, image)
                if decoded is not None:
                    return crop_pixels(decoded, preprocessing)
        return np.asarray(crop_image(_decode(image, name), preprocessing).convert("RGB"), dtype=np.uint8)


def _crop_array(pixels: Pixels, preprocessing: Preprocessing, options: DecodingOptions) -> Pixels:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ImageError(
            f"pixels of shape {pixels.shape} and type {pixels.dtype} are not an image",
            "give uint8 of shape height, width, 3",
        )
    rgb: Pixels = np.array(pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2))
    if options.library == "simplejpeg":
        return crop_pixels(rgb, preprocessing)
    return np.asarray(crop_image(Image.fromarray(rgb), preprocessing), dtype=np.uint8)


def _read(source: ImageSource | bytes, options: DecodingOptions) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, "the image"
    return read_source(source, options.max_bytes), str(source)


def _open(data: bytes, name: str, options: DecodingOptions) -> Image.Image:
    """The image with its header read, its size within the limit, and nothing decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that can be read ({', '.join(FORMATS)})") from error
    except Exception as error:
        raise _damaged(name, error) from error
    needed = _decoded_bytes(image)
    if needed > options.max_bytes:
        image.close()
        raise ImageError(
            f"{name} is too large ({image.width} x {image.height} pixels take {needed / 2**20:,.0f} MiB decoded, "
            f"at most {options.max_bytes / 2**20:,.0f} are allowed)"
        )
    return image


def _decoded_bytes(image: Image.Image) -> int:
    # The decoder of WebP keeps a frame of its own beside the one that it gives.
    return image.width * image.height * (8 if image.format == "WEBP" else 4)


def _memory(image: Image.Image) -> threading.Lock | nullcontext[None]:
    return _one_large_image if _decoded_bytes(image) > _LARGE_BYTES else nullcontext()


def _decode(image: Image.Image, name: str) -> Image.Image:
    """The whole image as 8-bit RGB, or gray while that takes a quarter of the memory."""
    try:
        with _memory(image):
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_8_bits(image)
    except Exception as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ImageError:
    """Whatever a decoder raises means a bad file: each has its own exceptions, RuntimeError and TypeError too."""
    said = str(error).splitlines()
    return ImageError(f"{name} is damaged ({said[0] if said else type(error).__name__})")


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_bytes(image)
    # Pillow wants this step before RGB, and warns without it.
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


# As 64-bit integers, which the scaling takes, a strip is 8 MiB.
_STRIP_PIXELS = 1 << 20


def _to_bytes(image: Image.Image) -> Image.Image:
    """A gray image of 16 or 32 bits as 8 bits, strip by strip; Pillow's own conversion clips at 255.

    Integers are scaled from 16 bits, unless none in a 32-bit image is above 255; floats are taken as 0 to 255.
    """
    rows = max(1, _STRIP_PIXELS // max(1, image.width))
    strips = [(0, y, image.width, min(y + rows, image.height)) for y in range(0, image.height, rows)]
    deep = image.mode.startswith("I;16")
    if image.mode == "I":
        deep = any(int(np.asarray(image.crop(strip)).max(initial=0)) > 255 for strip in strips)
    result = Image.new("L", image.size)
    for strip in strips:
        values = np.asarray(image.crop(strip))
        if image.mode == "F":
            values = np.rint(np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0))
        else:
            # (v + 128) // 257 is v / 257 rounded.
            values = (values.astype(np.int64) + 128) // 257 if deep else values
        result.paste(Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)), strip[:2])
    return result


def crop_image(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The image with its short side resized to `resize`, cropped at the centre to height x width.

    Rounding and interpolation are those of torchvision's Resize and CenterCrop on PIL images. A crop larger than the
    image is black outside it.
    """
    size, box = _plan_crop(image.size, preprocessing)
    interpolation = Image.Resampling[preprocessing.interpolation.upper()]
    if _is_strip(image.size) or size[0] * size[1] > _MOST_RESIZED:
        return _resize_inside(image, size, box, interpolation)
    if size != image.size:
        image = image.resize(size, interpolation)
    return image if box == (0, 0, *image.size) else image.crop(box)


def crop_pixels(pixels: Pixels, preprocessing: Preprocessing) -> Pixels:
    """`crop_image` of decoded pixels (H, W, 3 or 1), within 2 of 255 of it; (height, width, 3)."""
    height, width = pixels.shape[:2]
    size, (left, top, right, bottom) = _plan_crop((width, height), preprocessing)
    inside = left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]
    too_large = _is_strip((width, height)) or size[0] * size[1] > _MOST_RESIZED
    if too_large or not inside or preprocessing.interpolation != "bilinear":
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return np.asarray(crop_image(image.convert("RGB"), preprocessing), dtype=np.uint8)
    if size != (width, height):
        pixels = resize_bilinear(pixels, *size)
    cropped = pixels[top:bottom, left:right]
    return np.ascontiguousarray(cropped if cropped.shape[2] == 3 else np.repeat(cropped, 3, axis=2))


_MOST_RESIZED = 1 << 26
"""Pixels up to which an image is resized as a whole before it is cropped."""

Size = tuple[int, int]
Box = tuple[int, int, int, int]


def _plan_crop(size: Size, preprocessing: Preprocessing) -> tuple[Size, Box]:
    """The (width, height) that an image is resized to, and the box that is cropped of it; left, top, right, bottom."""
    width, height = size
    short, longer = min(size), max(size)
    if short != preprocessing.resize:
        scaled = max(preprocessing.resize, int(preprocessing.resize * longer / short))
        size = (preprocessing.resize, scaled) if width <= height else (scaled, preprocessing.resize)
    left, top = _crop_edge(size[0], preprocessing.width), _crop_edge(size[1], preprocessing.height)
    return size, (left, top, left + preprocessing.width, top + preprocessing.height)


_LONG = 16
"""Aspect ratio from which an image is not resized as a whole: a strip of one pixel would take gigabytes."""


def _is_strip(size: Size) -> bool:
    return max(size) > _LONG * min(size)


def _crop_edge(size: int, crop: int) -> int:
    """Where the crop begins: torchvision rounds half to even inside the image, and down the padding outside it."""
    return round((size - crop) / 2.0) if crop <= size else -((crop - size) // 2)


def _resize_inside(image: Image.Image, size: Size, box: Box, interpolation: Image.Resampling) -> Image.Image:
    """`image` resized to `size` and cropped to `box`; nothing outside the crop is computed."""
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    x, y = image.width / size[0], image.height / size[1]
    source = (left * x, top * y, right * x, bottom * y)
    part = image.resize((right - left, bottom - top), interpolation, box=source)
    return part.crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top))


def normalize(pixels: Pixels, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """(x / 255 − mean) / std of pixels (N, H, W, C), as float32 (N, C, H, W).

    One channel in `mean` takes the luma of RGB pixels (ITU-R 601-2, as Pillow's grayscale).
    """
    if len(preprocessing.mean) == 1:
        pixels = take_luma(pixels)
    scale, shift = scale_and_shift(preprocessing)
    # Moved while they are bytes, then computed in place: a tenth of the time of the same with floats.
    values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    values *= scale[:, None, None]
    values += shift[:, None, None]
    return values


def take_luma(pixels: Pixels) -> Pixels:
    """RGB pixels (N, H, W, 3) as grayscale (N, H, W, 1) by ITU-R 601-2; pixels of one channel as they are."""
    if pixels.shape[-1] != 3:
        return pixels
    return np.stack([np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in pixels])


def scale_and_shift(preprocessing: Preprocessing) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per channel (1 / (255·std), −mean / std), rounded to float32 once: what a graph with uint8 input uses as well."""
    mean, std = (np.asarray(values, dtype=np.float64) for values in (preprocessing.mean, preprocessing.std))
    return (1.0 / (255.0 * std)).astype(np.float32), (-mean / std).astype(np.float32)
