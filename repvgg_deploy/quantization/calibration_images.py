"""The images that INT8 is calibrated on: chosen by a seed, prepared as for inference, read as often as needed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import ImageError
from repvgg_deploy.images.decoding import Pixels, normalize
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.images.sources import ImageSource, Unreadable, list_images
from repvgg_deploy.progress import SILENT, Progress

_BATCH = 32
# Decoded pixels are kept in memory up to this many bytes; beyond it every pass decodes the files anew.
_KEPT_BYTES = 1 << 29


@dataclass
class CalibrationImages:
    """Batches of normalized images (n, C, H, W), any number of times; memory does not grow with their number.

    `broken` names the files that were left out, after the first pass.
    """

    paths: tuple[ImageSource, ...]
    preprocessing: Preprocessing
    broken: BrokenImages
    _kept: list[Pixels] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for pixels in self._kept if self._kept is not None else self._read():
            yield normalize(pixels, self.preprocessing)

    def _read(self) -> Iterator[Pixels]:
        size = len(self.paths) * self.preprocessing.height * self.preprocessing.width * 3
        kept: list[Pixels] = []
        for pixels, _ in read_batches(self.paths, self.preprocessing, _BATCH, self.broken):
            if size <= _KEPT_BYTES:
                kept.append(pixels)
            yield pixels
        self._kept = kept or None


def choose_sources(source: Path, count: int, seed: int) -> tuple[ImageSource, ...]:
    """The images that `choose_images` takes, in their order.

    Raises:
        ImageError: there is no image.
    """
    paths = list_images(source)
    # Of a folder that cannot be read nothing can be drawn, but that there is one is told.
    closed = [path for path in paths if isinstance(path, Unreadable)]
    paths = tuple(path for path in paths if not isinstance(path, Unreadable))
    if len(paths) > count:
        paths = tuple(sorted(random.Random(seed).sample(paths, count), key=lambda image: Path(str(image))))
    return (*paths, *closed)


def choose_images(
    source: Path, count: int, seed: int, preprocessing: Preprocessing, progress: Progress = SILENT
) -> CalibrationImages:
    """`count` images of a folder, or of a list of paths, drawn with `seed`; all of them where there are fewer.

    The choice depends on the files' names only, not on the order in which the disk lists them.

    Raises:
        ImageError: there is no image; nothing is ever calibrated on random data.
    """
    paths = choose_sources(source, count, seed)
    images = CalibrationImages(paths, preprocessing, BrokenImages())
    if len(preprocessing.mean) not in (1, 3):
        raise ImageError(
            f"images have 3 channels, but the net takes {len(preprocessing.mean)}",
            "call repvgg_deploy.quantization.quantize with your own batches",
        )
    progress.note(f"calibrating on {len(paths)} images of {source}")
    return images
