"""Several views of each calibration image: mirrored, and shifted by a few pixels. They make up for few images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg_deploy.quantization.points import Images

# Mirrored or not, and how far down and to the right, in shares of the size.
_VIEWS = ((False, 0.0, 0.0), (True, 0.0, 0.0), (False, 3 / 64, -2 / 64), (True, -3 / 64, 2 / 64))
MOST_VIEWS = len(_VIEWS)


@dataclass(frozen=True)
class Views:
    """All `images` as they are, then all of them mirrored, and so on, `count` times; iterated as often as is needed.

    `images` are batches of normalized images (N, C, H, W); `count` is 1 to `MOST_VIEWS`.
    """

    images: Images
    count: int

    def __iter__(self) -> Iterator[Tensor]:
        """Batches as `images` gives them."""
        for view in _VIEWS[: self.count]:
            for batch in self.images:
                yield move(torch.as_tensor(batch), *view)


def move(images: Tensor, mirrored: bool, down: float, right: float) -> Tensor:
    """The same images (N, C, H, W) from elsewhere, by shares of the size; a border's own mirror image comes in."""
    images = images.flip(3) if mirrored else images
    height, width = images.shape[2:]
    y, x = (max(1 - size, min(size - 1, round(share * size))) for share, size in ((down, height), (right, width)))
    padded = F.pad(images, [max(x, 0), max(-x, 0), max(y, 0), max(-y, 0)], mode="reflect")
    return padded[:, :, max(-y, 0) :, max(-x, 0) :][:, :, :height, :width]
