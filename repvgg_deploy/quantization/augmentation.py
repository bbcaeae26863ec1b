"""Augmented images for learned rounding: calibration images cropped, recoloured and blended at random.

A net that learns from a few hundred images fits what is peculiar to them. Here it learns to answer as the float net
does, which has an answer to any image, so an augmented image need not look natural, as long as each is different.
Source: "Knowledge distillation: A good teacher is patient and consistent" (https://arxiv.org/abs/2106.05237); the
blending is mixup (https://arxiv.org/abs/1710.09412).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg_deploy.quantization.points import Images

# How small a crop may be, in shares of the size, and how much wider than high or the other way round (natural log).
_SMALLEST = 0.6
_STRETCH = 0.25
# Of normalized values: the spread of an image's and a channel's factor (natural log), and of what is added to them.
_CONTRAST, _BALANCE = 0.15, 0.05
_BRIGHTNESS, _TINT = 0.2, 0.05
_MOST_SATURATION = 2.0


def draw_pictures(images: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of `count` augmentations of normalized `images` (N, 3, H, W), channels last; `seed` decides all.

    No value is outside the range that its channel has in `images`, so that the images do not cause a coarser
    scale. All draws are made on the CPU, so that they are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    lowest, highest = images.amin((0, 2, 3))[:, None, None], images.amax((0, 2, 3))[:, None, None]
    while True:
        chosen = torch.randint(len(images), (count,), generator=generator)
        batch = crop(images[chosen.to(images.device)], generator)
        batch = torch.minimum(torch.maximum(recolour(batch, generator), lowest), highest)
        batch = blend(batch, generator)
        yield batch.contiguous(memory_format=torch.channels_last)


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of each image, or it and some of its own reflection, at the same size; every second mirrored."""
    count = len(images)
    # From 0.6 to 1.1: above 1 the image's own reflection shows at its borders.
    size = _SMALLEST + (1 - _SMALLEST) * 1.25 * torch.rand(count, generator=generator)
    stretch = ((2 * torch.rand(count, generator=generator) - 1) * _STRETCH).exp()
    width, height = size * stretch, size / stretch
    right, down = 2 * torch.rand(2, count, generator=generator) - 1
    mirrored = 1 - 2 * torch.randint(2, (count,), generator=generator)
    frame = torch.zeros(count, 2, 3)
    frame[:, 0, 0], frame[:, 1, 1] = width * mirrored, height
    frame[:, 0, 2], frame[:, 1, 2] = right * (1 - width).abs(), down * (1 - height).abs()
    grid = F.affine_grid(frame.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Other contrast, brightness and balance of colours, and in about half of the images less or more saturation.

    A net can be driven to its strongest activations by colours that few calibration images have.
    """
    count, channels = images.shape[:2]

    def spread(size: float, channels: int) -> Tensor:
        drawn = torch.randn(count, channels, 1, 1, generator=generator)
        return (size * drawn).to(images.device)

    images = images * (spread(_CONTRAST, 1) + spread(_BALANCE, channels)).exp()
    images = images + spread(_BRIGHTNESS, 1) + spread(_TINT, channels)
    saturation = _MOST_SATURATION * torch.rand(count, 1, 1, 1, generator=generator)
    changed = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    saturation = torch.where(changed, saturation, torch.ones(())).to(images.device)
    grey = images.mean(1, keepdim=True)
    return grey + saturation * (images - grey)


def blend(images: Tensor, generator: torch.Generator) -> Tensor:
    """About half of the images mixed with the one before, of which at most half shows."""
    share = 1 - 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator)
    mixed = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    share = torch.where(mixed, share, torch.ones(())).to(images.device)
    return share * images + (1 - share) * images.roll(1, 0)


# Mirrored or not, and how far down and to the right, in shares of the size.
_AUGMENTATIONS = ((False, 0.0, 0.0), (True, 0.0, 0.0), (False, 3 / 64, -2 / 64), (True, -3 / 64, 2 / 64))


MOST_AUGMENTATIONS = len(_AUGMENTATIONS)


@dataclass(frozen=True)
class AugmentedImages:
    """All `images` as they are, then all of them mirrored, and so on, `count` times; iterated as often as is needed.

    `images` are batches of normalized images (N, C, H, W); `count` is 1 to `MOST_AUGMENTATIONS`.
    """

    images: Images
    count: int

    def __iter__(self) -> Iterator[Tensor]:
        """Batches as `images` gives them."""
        for augmentation in _AUGMENTATIONS[: self.count]:
            for batch in self.images:
                yield move(torch.as_tensor(batch), *augmentation)


def move(images: Tensor, mirrored: bool, down: float, right: float) -> Tensor:
    """The same images (N, C, H, W) from elsewhere, by shares of the size; a border's own mirror image comes in."""
    images = images.flip(3) if mirrored else images
    height, width = images.shape[2:]
    # Reflecting takes fewer pixels than there are.
    y, x = (max(1 - size, min(size - 1, round(share * size))) for share, size in ((down, height), (right, width)))
    padded = F.pad(images, [max(x, 0), max(-x, 0), max(y, 0), max(-y, 0)], mode="reflect")
    return padded[:, :, max(-y, 0) :, max(-x, 0) :][:, :, :height, :width]
