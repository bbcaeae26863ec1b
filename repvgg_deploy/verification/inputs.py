"""The inputs that a net is verified on: synthetic images, or the user's own, and noise; as many as a budget allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import ImageError
from repvgg_deploy.images.decoding import Pixels
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.images.sources import list_images
from repvgg_deploy.images.synthetic import draw_images
from repvgg_deploy.nets.cost import count_flops
from repvgg_deploy.nets.spec import ArchSpec

# Multiply-adds that a stage may cost: in float32 a fifth of a second. Every weight has a part in the outputs of one
# image, so that more of them add little to a comparison. Float64 runs at about a twentieth of that speed.
_FLOAT64_BUDGET = 1e9
_FLOAT32_BUDGET = 8e9
_MOST_IMAGES = 16


@dataclass(frozen=True)
class VerificationInputs:
    """Pixels (N, H, W, C) uint8 for the two comparisons of an export.

    Attributes:
        small: for training form in float64 against fused; at a reduced size where the full one is over the budget,
            since the algebra of fusing does not depend on the size.
        full: for fused against the graph, at the size of the graph.
    """

    small: Pixels
    full: Pixels


def choose_inputs(
    spec: ArchSpec, preprocessing: Preprocessing, data: Path | None = None, full: bool = False
) -> VerificationInputs:
    """Images, of `data` or synthetic ones, and where several are affordable one image of noise.

    With `full` both comparisons take 16 images at the size of the graph.
    """
    if full:
        pixels = choose_pixels(preprocessing, spec.in_channels, _MOST_IMAGES, data)
        return VerificationInputs(pixels, pixels)
    per_image = count_flops(spec, preprocessing.height, preprocessing.width)
    affordable = int(min(_MOST_IMAGES, max(1, _FLOAT32_BUDGET // per_image)))
    return VerificationInputs(
        choose_small_pixels(spec, preprocessing, data),
        choose_pixels(preprocessing, spec.in_channels, affordable, data),
    )


def choose_small_pixels(spec: ArchSpec, preprocessing: Preprocessing, data: Path | None = None) -> Pixels:
    """Four images, or two of a large net, of a size that training form in float64 can afford."""
    height, width = preprocessing.height, preprocessing.width
    scale = min(1.0, (_FLOAT64_BUDGET / (4 * count_flops(spec, height, width))) ** 0.5)
    if scale < 1.0:
        # Multiples of 32, the stride of the whole net. On a map of one pixel a 3x3 kernel's outer taps see nothing but
        # padding; from 64 pixels on, every tap of every block has a part in the logits.
        height, width = (max(min(size, 64), int(size * scale) // 32 * 32) for size in (height, width))
    small = replace(preprocessing, height=height, width=width, resize=max(height, width))
    count = 4 if 4 * count_flops(spec, height, width) <= 2 * _FLOAT64_BUDGET else 2
    return choose_pixels(small, spec.in_channels, count, data)


def choose_pixels(preprocessing: Preprocessing, channels: int, count: int, data: Path | None = None) -> Pixels:
    """`count` images; of several the last is noise, and of a net that takes no RGB all are."""
    height, width = preprocessing.height, preprocessing.width
    noise = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    if channels not in (1, 3):
        if data is not None:
            raise ImageError(f"images have 3 channels, but the net takes {channels}", "leave the image folder out")
        return noise
    wanted = max(1, count - 1)
    pictures = _drawn(wanted, height, width) if data is None else _from_folder(data, preprocessing, wanted)
    if channels == 1:
        pictures = pictures.mean(axis=-1, keepdims=True).astype(np.uint8)
    return np.concatenate([pictures, noise[: count - len(pictures)]])


# Below 32 an image has no room for its figure; above 64, drawing takes longer than running a small net.
_SMALLEST_DRAWN, _LARGEST_DRAWN = 32, 64


def _drawn(count: int, height: int, width: int) -> Pixels:
    """Synthetic images (count, height, width, 3), enlarged where the net takes large ones."""
    size = max(height, width, _SMALLEST_DRAWN)
    pixels, _ = draw_images(count, seed=0, size=min(size, _LARGEST_DRAWN))
    if size > _LARGEST_DRAWN:
        pixels = np.stack(
            [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in pixels]
        )
    top, left = (size - height) // 2, (size - width) // 2
    return pixels[:, top : top + height, left : left + width]


def _from_folder(data: Path, preprocessing: Preprocessing, count: int) -> Pixels:
    paths = list_images(data)
    # Spread over the folder, so that several classes are met.
    chosen = [paths[i * len(paths) // min(count, len(paths))] for i in range(min(count, len(paths)))]
    broken = BrokenImages()
    batches = [pixels for pixels, _ in read_batches(chosen, preprocessing, count, broken)]
    if broken.reasons:
        raise ImageError(next(iter(broken.reasons.values())), "remove it, or give another folder")
    return np.concatenate(batches)
