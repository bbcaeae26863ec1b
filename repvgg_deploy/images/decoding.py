"""Images from files: decode, resize, crop, normalize; folders and lists of them, decoded in threads."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import ImageError
from repvgg_deploy.threads import start_workers

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class LabelledImages:
    """Image files with the index of their class; `class_names` are the folders' names in sorted order."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]


@dataclass
class BrokenImages:
    """The files that could not be decoded, with the reason; filled while images are read."""

    reasons: dict[Path, str] = field(default_factory=dict)


def decode_image(path: Path) -> Image.Image:
    """The image in a file as 8-bit RGB, turned as its EXIF orientation says.

    Grayscale, palette, CMYK, alpha and 16-bit images are converted; of an animation the first frame is taken.

    Raises:
        ImageError: the file is no image, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is no image that can be read") from error
    except FileNotFoundError as error:
        raise ImageError(f"there is no image {path}") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{path} is damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grayscale: Pillow's own conversion clips at 255 instead of scaling.
        deep = np.asarray(image, dtype=np.float64)
        scale = 257.0 if deep.max(initial=0) > 255 or image.mode.startswith("I;16") else 1.0
        image = Image.fromarray(np.clip(np.rint(deep / scale), 0, 255).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def crop_image(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The image with its short side resized to `resize` (bilinear), cropped at the centre to height x width.

    Rounding is that of torchvision's Resize and CenterCrop on PIL images. A crop larger than the image is black
    outside it.
    """
    width, height = image.size
    short, longer = min(width, height), max(width, height)
    size = (width, height)
    if short != preprocessing.resize:
        scaled = max(preprocessing.resize, int(preprocessing.resize * longer / short))
        size = (preprocessing.resize, scaled) if width <= height else (scaled, preprocessing.resize)
    left, top = _crop_edge(size[0], preprocessing.width), _crop_edge(size[1], preprocessing.height)
    box = (left, top, left + preprocessing.width, top + preprocessing.height)
    if longer > _LONG * short:
        return _resize_inside(image, size, box)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return image if box == (0, 0, *image.size) else image.crop(box)


_LONG = 16
"""Aspect ratio from which an image is not resized as a whole: a strip of one pixel would take gigabytes."""


def _crop_edge(size: int, crop: int) -> int:
    """Where the crop begins: torchvision rounds half to even inside the image, and down the padding outside it."""
    return round((size - crop) / 2.0) if crop <= size else -((crop - size) // 2)


def _resize_inside(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """`image` resized to `size` and cropped to `box`; nothing outside the crop is computed."""
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    x, y = image.width / size[0], image.height / size[1]
    source = (left * x, top * y, right * x, bottom * y)
    part = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=source)
    return part.crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top))


def read_pixels(path: Path, preprocessing: Preprocessing) -> Pixels:
    """The cropped image of a file, uint8 (H, W, 3).

    Raises:
        ImageError: the file is no image, or a damaged one.
    """
    return np.asarray(crop_image(decode_image(path), preprocessing), dtype=np.uint8)


def normalize(pixels: Pixels, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """(x / 255 − mean) / std of pixels (N, H, W, C), as float32 (N, C, H, W).

    One channel in `mean` takes the luma of RGB pixels (ITU-R 601-2, as Pillow's grayscale).
    """
    if len(preprocessing.mean) == 1:
        pixels = take_luma(pixels)
    scale, shift = scale_and_shift(preprocessing)
    return np.ascontiguousarray((pixels.astype(np.float32) * scale + shift).transpose(0, 3, 1, 2))


def take_luma(pixels: Pixels) -> Pixels:
    """RGB pixels (N, H, W, 3) as grayscale (N, H, W, 1) by ITU-R 601-2; pixels of one channel as they are."""
    if pixels.shape[-1] != 3:
        return pixels
    return np.stack([np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in pixels])


def scale_and_shift(preprocessing: Preprocessing) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per channel (1 / (255·std), −mean / std), rounded to float32 once: what a graph with uint8 input uses as well."""
    mean, std = (np.asarray(values, dtype=np.float64) for values in (preprocessing.mean, preprocessing.std))
    return (1.0 / (255.0 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def list_images(source: Path) -> tuple[Path, ...]:
    """All image files below a folder, sorted; those that a text file lists, one path a line; or one image.

    Paths in a list are relative to the list; empty lines and lines that begin with # do not count.

    Raises:
        ImageError: there is no such folder or list, or no image in it.
    """
    if source.is_file() and source.suffix.lower() in SUFFIXES:
        return (source,)
    if source.is_file():
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ImageError(f"{source} is no list of images ({error})", "a text file, one path a line") from error
        lines = [line.strip() for line in text.splitlines()]
        paths = tuple(source.parent / line for line in lines if line and not line.startswith("#"))
    elif source.is_dir():
        paths = tuple(sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()))
    else:
        raise ImageError(f"there is no folder {source}", "give a folder of images")
    if not paths:
        raise ImageError(f"there is no image in {source}", f"known endings: {' '.join(sorted(SUFFIXES))}")
    return paths


def list_labelled_images(folder: Path) -> LabelledImages:
    """The images of `folder`/<class>/…, classes in the sorted order of their names.

    Raises:
        ImageError: there is no such folder, it has no class folders, or no image in them.
    """
    if not folder.is_dir():
        raise ImageError(f"there is no folder {folder}", "give a folder with one folder of images a class")
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not found:
        raise ImageError(f"{folder} has no image in class folders", f"expected {folder}/<class>/<image>.jpg")
    paths, labels = zip(*found, strict=True)
    return LabelledImages(paths, labels, classes)


def read_batches(
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    batch: int,
    broken: BrokenImages,
    workers: int | None = None,
) -> Iterator[tuple[Pixels, list[int]]]:
    """Batches of cropped pixels (n, H, W, 3), each with the indices of its images in `paths`; in order.

    Threads decode ahead of the caller, at most four batches. A file that is no image goes into `broken`.
    """
    # Closed here, and not with the traceback of an error, so that its threads end first.
    with closing(_decode_ahead(paths, preprocessing, 4 * batch, workers)) as decoded:
        pixels: list[Pixels] = []
        indices: list[int] = []
        for index, result in enumerate(decoded):
            if isinstance(result, ImageError):
                broken.reasons[paths[index]] = result.message
                continue
            pixels.append(result)
            indices.append(index)
            if len(pixels) == batch:
                yield np.stack(pixels), indices
                pixels, indices = [], []
        if pixels:
            yield np.stack(pixels), indices


def _decode_ahead(
    paths: Iterable[Path], preprocessing: Preprocessing, ahead: int, workers: int | None
) -> Generator[Pixels | ImageError, None, None]:
    def decode(path: Path) -> Pixels | ImageError:
        try:
            return read_pixels(path, preprocessing)
        except ImageError as error:
            return error

    # The filters of warnings are shared by all threads, so they are set once, out here. Pillow warns about the size of
    # large images and about damaged EXIF data; neither matters to who wants the pixels.
    with warnings.catch_warnings(), start_workers(workers or min(16, os.cpu_count() or 1)) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        waiting: deque[Future[Pixels | ImageError]] = deque()
        try:
            for path in paths:
                waiting.append(pool.submit(decode, path))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
