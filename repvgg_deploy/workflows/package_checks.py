"""The preprocessing graph of `package`, held against Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from repvgg_deploy.artifacts import Array
from repvgg_deploy.errors import VerificationError
from repvgg_deploy.graphs.preprocessing import PIXELS
from repvgg_deploy.images.decoding import DecodingOptions, Pixels, decode_image, normalize, read_pixels, scale_and_shift
from repvgg_deploy.images.sources import list_images
from repvgg_deploy.images.synthetic import draw_image
from repvgg_deploy.runtime.session import GraphSession
from repvgg_deploy.workflows.package_sources import Source

_MOST_PICTURES = 16
# Width and height, smaller and larger than what nets take, and two of odd numbers.
_SIZES = ((500, 375), (333, 500), (640, 480), (180, 241), (96, 64), (257, 257))
_PILLOW = DecodingOptions(decoder="pillow")
# Weights from float32 round to other bytes now and then, and recent releases of Pillow resize tall images first by
# height, others first by width as ONNX Runtime does.
_MOST_LEVELS = 16.0


@dataclass(frozen=True)
class PreprocessingParity:
    """How the graph's values differ from Pillow's, both before normalization.

    Attributes:
        pictures: how many were compared.
        equal: share of equal values, in percent.
        max_levels: largest difference, in steps of 1/255.
    """

    pictures: int
    equal: float
    max_levels: float


def read_pictures(data: Path | None) -> list[Pixels]:
    """RGB images of several sizes: the first ones of `data`, or synthetic ones.

    Raises:
        ImageError: one of them cannot be read, or there is none.
    """
    if data is not None:
        return [np.asarray(decode_image(source)) for source in list_images(data)[:_MOST_PICTURES]]
    drawn = (draw_image(index, seed=index) for index in range(len(_SIZES)))
    enlarged = (image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(drawn, _SIZES, strict=True))
    return [np.asarray(image) for image in enlarged]


def prepare(picture: Pixels, source: Source) -> Array:
    """The net's input for one image, of batch 1, by Pillow; for a net that does not take RGB, noise."""
    size = source.preprocessing.height, source.preprocessing.width
    if source.channels != len(source.preprocessing.mean) or source.channels not in (1, 3):
        noise = np.random.default_rng(0).standard_normal((1, source.channels, *size))
        return noise.astype(source.input.dtype)
    pixels = read_pixels(picture, source.preprocessing, _PILLOW)[None]
    return pixels if source.takes_pixels else normalize(pixels, source.preprocessing).astype(source.input.dtype)


def compare_with_pillow(session: GraphSession, source: Source, pictures: Sequence[Pixels]) -> PreprocessingParity:
    """The differences over all pictures.

    Raises:
        VerificationError: a value differs by more than 16/255.
    """
    steps: Array = np.ones(1)
    if not source.takes_pixels:
        steps = scale_and_shift(source.preprocessing)[0].astype(np.float64)[:, None, None]
    levels = [
        np.abs(session.run({PIXELS: picture})[source.input.name].astype(np.float64) - prepare(picture, source)) / steps
        for picture in pictures
    ]
    differences = np.concatenate([values.ravel() for values in levels])
    # Half a step: float16 does not hold every level exactly.
    equal, largest = 100 * float((differences < 0.5).mean()), float(differences.max())
    parity = PreprocessingParity(len(pictures), round(equal, 3), round(largest, 2))
    if not largest <= _MOST_LEVELS + 0.5:
        raise VerificationError(
            f"the preprocessing graph gives {equal:.2f} % of Pillow's values on {len(pictures)} images, and differs "
            f"by up to {largest:.0f}/255",
            f"at most {_MOST_LEVELS:g}/255 is allowed; nothing was written; --no-preprocess leaves it out",
        )
    return parity
