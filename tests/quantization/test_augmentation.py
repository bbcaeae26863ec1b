"""The pictures that learned rounding sees."""

from __future__ import annotations

import itertools

import torch
from helpers.quantized_nets import draw_images
from torch import Tensor

from repvgg_deploy.quantization.augmentation import blend, crop, draw_pictures, recolour


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def take(images: Tensor, batches: int, seed: int = 0) -> list[Tensor]:
    return list(itertools.islice(draw_pictures(images, 12, seed), batches))


def test_pictures_are_the_seeds_and_none_comes_twice() -> None:
    images = draw_images(40)
    first, again, other = take(images, 3), take(images, 3), take(images, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    pictures = torch.cat(first).flatten(1)
    assert len(pictures.unique(dim=0)) == 36


def test_pictures_stay_within_the_range_that_each_channel_has() -> None:
    images = draw_images(40) * torch.tensor([0.5, 1.0, 3.0])[:, None, None]
    lowest, highest = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    pictures = torch.cat(take(images, 8))
    assert pictures.shape == (96, *images.shape[1:])
    slack = 1e-5 * (highest - lowest)
    assert (pictures.amin((0, 2, 3)) >= lowest - slack).all()
    assert (pictures.amax((0, 2, 3)) <= highest + slack).all()


def test_a_crop_shows_a_part_of_its_own_image_and_every_second_is_mirrored() -> None:
    # Brighter from left to right: a crop keeps the order, a mirrored one turns it round.
    ramp = torch.arange(32.0).expand(400, 3, 24, 32)
    crops = crop(ramp, generator())
    assert crops.shape == ramp.shape
    assert float(crops.amin()) >= 0.0
    assert float(crops.amax()) <= 31.0
    inner = crops[:, 0, 12, 8:24]
    rising = (inner[:, -1] > inner[:, 0]).float().mean()
    assert 0.4 < rising < 0.6
    widths = (inner[:, -1] - inner[:, 0]).abs() / 15
    assert widths.min() < 0.65
    assert widths.max() > 1.0


def test_grey_has_no_saturation_to_change() -> None:
    grey = torch.rand(64, 1, 4, 4, generator=generator()).expand(-1, 3, -1, -1)
    recoloured = recolour(grey, generator(1))
    # What balance and tint bring in is small beside contrast and brightness, also where it is doubled.
    assert recoloured.std(1).max() < 0.6
    assert (recoloured - grey).abs().mean() > 0.1


def test_saturation_is_left_alone_lowered_and_raised() -> None:
    colourful = torch.zeros(400, 3, 2, 2)
    colourful[:, 0], colourful[:, 2] = 2.0, -2.0
    spread = recolour(colourful, generator())[:, 0, 0, 0] - recolour(colourful, generator())[:, 2, 0, 0]
    usual = ((spread > 2.5) & (spread < 6.0)).float().mean()
    assert (spread < 1.0).any()
    assert (spread > 6.5).any()
    assert usual > 0.5


def test_a_blend_shows_at_least_half_of_its_image_and_half_of_the_images_are_left_alone() -> None:
    images = torch.eye(200).reshape(200, 1, 1, 200)
    blended = blend(images, generator()).reshape(200, 200)
    own, before = blended.diagonal(), blended.roll(1, 1).diagonal()
    assert torch.allclose(own + before, torch.ones(200))
    assert own.min() >= 0.5
    assert 0.4 < (own == 1).float().mean() < 0.6
