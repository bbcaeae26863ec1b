"""Calibration images that are nearly the same one are told from photographs of one class, or of anything else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.quantized_nets import QUICK, draw_images, fused_net

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.quantization import quantize
from repvgg_deploy.quantization.calibration_images import choose_images
from repvgg_deploy.quantization.distinct_images import count_distinct

SMALL = Preprocessing(64, 64, 64)


def scene(seed: int) -> torch.Tensor:
    """A smooth picture (1, 3, 64, 64) with values from 0 to 1."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)


def copies(of: torch.Tensor, count: int, noise: float) -> torch.Tensor:
    return of + noise * torch.randn(count, *of.shape[1:], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("noise", [0.0, 1 / 255, 10 / 255])
@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.0), (255.0, 0.0), (4.4, -2.1)])
def test_copies_with_noise_are_one_image_whatever_the_unit_of_their_pixels(
    noise: float, scale: float, mean: float
) -> None:
    images = scale * copies(scene(0), 64, noise) + mean
    assert count_distinct(images.split(10), 32) == 1


def test_each_scene_counts_once() -> None:
    images = torch.cat([copies(scene(seed), 16, 0.01) for seed in range(4)])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert count_distinct([images[order]], 32) == 4


def test_images_of_one_colour_without_structure_are_told_apart_by_the_colour() -> None:
    assert count_distinct([torch.zeros(8, 3, 16, 16)], 32) == 1
    assert count_distinct([torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 16, 16)], 32) == 3


def test_no_more_images_are_read_than_needed() -> None:
    def images() -> Iterator[torch.Tensor]:
        yield torch.cat([scene(seed) for seed in range(32)])
        pytest.fail("read on")

    assert count_distinct(images(), 32) == 32


def test_drawn_images_are_all_distinct_and_so_are_those_of_one_class(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 60, seed=5, size=64)
    assert count_distinct(choose_images(tmp_path, 60, 0, SMALL), 60) == 60
    for folder in tmp_path.iterdir():
        assert count_distinct(choose_images(folder, 60, 0, SMALL), 60) == len(list(folder.iterdir()))


@pytest.mark.parametrize("folder", ["tinyimagenet/calibration", "photos"])
def test_photographs_are_all_distinct(folder: str, shared: Path) -> None:
    images = choose_images(shared / "data" / folder, 200, 0, SMALL)
    assert count_distinct(images, 200) == len(images)


@pytest.mark.slow
def test_photographs_of_one_class_are_all_distinct(shared: Path) -> None:
    folders = [path for path in sorted((shared / "data" / "tinyimagenet" / "val").iterdir()) if path.is_dir()]
    for folder in folders[::4]:
        images = choose_images(folder, 100, 0, SMALL)
        assert count_distinct(images, 100) == len(images), folder.name


@pytest.mark.parametrize(
    ("images", "distinct"),
    [(copies(scene(0), 40, 0.01), 1), (torch.cat([copies(scene(n), 10, 0.01) for n in range(4)]), 4)],
)
def test_quantizing_warns_of_images_that_are_nearly_identical(images: torch.Tensor, distinct: int) -> None:
    small = torch.nn.functional.avg_pool2d(images, 2)
    with pytest.warns(UserWarning, match=rf"the 40 calibration images are nearly identical \({distinct} distinct\)"):
        quantize(fused_net(), [small], QUICK)


def test_a_duplicate_or_two_is_not_warned_of() -> None:
    images = draw_images(40)
    images[1::3] = images[::3][: len(images[1::3])]
    # Warnings are errors.
    quantize(fused_net(), [np.asarray(images)], QUICK)
