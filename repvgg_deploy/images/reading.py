"""Images decoded in threads ahead of their consumer, in order."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import ImageError
from repvgg_deploy.hardware.cpu import usable_cores
from repvgg_deploy.hardware.threads import start_workers
from repvgg_deploy.images.decoding import DecodingOptions, ImageData, Pixels, read_pixels
from repvgg_deploy.images.sources import ImageSource

# What cropped images that wait for their consumer may take.
_AHEAD_BYTES = 1 << 29


@dataclass
class BrokenImages:
    """The files that could not be decoded, with the reason; filled while images are read."""

    reasons: dict[ImageSource, str] = field(default_factory=dict)


def read_batches(
    sources: Sequence[ImageSource],
    preprocessing: Preprocessing,
    batch: int,
    broken: BrokenImages,
    options: DecodingOptions | None = None,
) -> Iterator[tuple[Pixels, list[int]]]:
    """Batches of cropped pixels (n, H, W, 3), each with the indices of its images in `sources`; in order.

    Threads decode ahead of the caller, at most four batches. A file that is not an image goes into `broken`.
    """
    # Closed here, and not with the traceback of an error, so that its threads end first.
    with closing(decode_ahead(sources, preprocessing, 4 * batch, options)) as decoded:
        pixels: list[Pixels] = []
        indices: list[int] = []
        for index, result in enumerate(decoded):
            if isinstance(result, ImageError):
                broken.reasons[sources[index]] = result.message
                continue
            pixels.append(result)
            indices.append(index)
            if len(pixels) == batch:
                yield np.stack(pixels), indices
                pixels, indices = [], []
        if pixels:
            yield np.stack(pixels), indices


def decode_ahead(
    sources: Iterable[ImageData],
    preprocessing: Preprocessing,
    ahead: int,
    options: DecodingOptions | None = None,
) -> Generator[Pixels | ImageError, None, None]:
    """The cropped pixels (H, W, 3) of each image, or why there are none; in order, decoded by threads.

    At most `ahead` images are decoded before the caller takes them, fewer if they are large. Libraries release the
    interpreter's lock while they decode and resize, so threads use all cores.
    """
    options = options or DecodingOptions()
    ahead = max(1, min(ahead, _AHEAD_BYTES // (3 * preprocessing.height * preprocessing.width)))
    # Python itself takes 5 % of the time of a photograph: beyond some twenty, threads would wait for its lock.
    workers = options.workers or min(16, usable_cores())

    def decode(source: ImageData) -> Pixels | ImageError:
        try:
            return read_pixels(source, preprocessing, options)
        except ImageError as error:
            return error

    # The filters of warnings are shared by all threads, so they are set once, out here. Pillow warns about the size of
    # large images and about damaged EXIF data; neither matters to the consumer of the pixels.
    with warnings.catch_warnings(), start_workers(workers) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        waiting: deque[Future[Pixels | ImageError]] = deque()
        try:
            for source in sources:
                waiting.append(pool.submit(decode, source))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
