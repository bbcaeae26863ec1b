"""The steps in front of rounding: statistics, dead inputs, equalization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.quantized_nets import draw_images, fused_net, in_batches

from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.points import fused_blocks, point_names, walk
from repvgg_deploy.quantization.statistics import CalibrationStatistics, collect_statistics


@pytest.mark.parametrize("size", [1, 7, 64])
def test_statistics_do_not_depend_on_the_batch_size(size: int) -> None:
    net, images = fused_net(), draw_images()
    reference = collect_statistics(net, in_batches(images, 32))
    other = collect_statistics(net, in_batches(images, size))
    assert other.images == 40
    assert other.images_sha256 == reference.images_sha256
    for name, point in reference.points.items():
        for key in ("lowest", "highest", "mean", "mean_square", "usual"):
            np.testing.assert_array_equal(
                getattr(other.points[name], key), getattr(point, key), err_msg=f"{name} {key}"
            )


def integer_net() -> RepVGG:
    """A fused net whose activations on images of small integers are small integers, which float32 adds exactly.

    So every CPU computes the same values, in whatever order it adds. Each filter has one +1, one −1 and a bias of 0 to
    3, so that behind the first ReLU a layer adds 3 to the largest value at most. The last feature maps have one pixel:
    the mean over it is exact too.
    """
    net = fused_net()
    generator = torch.Generator().manual_seed(5)
    for _, block in fused_blocks(net):
        filters = torch.zeros_like(block.conv.weight).flatten(1)
        for row in filters:
            row[torch.randperm(len(row), generator=generator)[:2]] = torch.tensor([1.0, -1.0])
        block.conv.weight.copy_(filters.view_as(block.conv.weight))
        block.conv.bias.copy_(torch.randint(0, 4, block.conv.bias.shape, generator=generator))
    return net


def test_statistics_are_those_of_the_values_at_each_point() -> None:
    net = integer_net()
    images = torch.randint(-3, 4, (40, 3, 32, 32), generator=torch.Generator().manual_seed(3)).float()
    statistics = collect_statistics(net, [images])
    assert list(statistics.points) == point_names(net)
    for name, x in walk(net, images):
        assert torch.equal(x, x.round())
        assert 0 < x.abs().max() < 2**12
        point, flat = statistics.points[name], x.double().movedim(1, 0).flatten(1)
        np.testing.assert_array_equal(point.lowest, flat.amin(1), err_msg=name)
        np.testing.assert_array_equal(point.highest, flat.amax(1), err_msg=name)
        np.testing.assert_array_equal(point.usual, flat.abs().amax(1), err_msg=name)
        # All sums are exact, and the numbers of pixels are powers of two; dividing by 40 images, or multiplying with
        # its rounded inverse, costs either side two roundings of 2⁻⁵³ at most.
        np.testing.assert_allclose(point.mean, flat.mean(1), rtol=2**-51, err_msg=name)
        np.testing.assert_allclose(point.mean_square, flat.square().mean(1), rtol=2**-51, err_msg=name)


def test_saved_statistics_come_back_for_the_same_checkpoint_and_images_only(tmp_path: Path) -> None:
    net, images = fused_net(), draw_images(4)
    statistics = collect_statistics(net, [images], sha256="a" * 64, augmentations=2)
    path = tmp_path / "cache.npz"
    statistics.save(path)
    loaded = CalibrationStatistics.load(path, net, "a" * 64, images.split(3))
    assert loaded.points.keys() == statistics.points.keys()
    np.testing.assert_array_equal(loaded.points["pool"].usual, statistics.points["pool"].usual)
    with pytest.raises(DeployError, match="another checkpoint"):
        CalibrationStatistics.load(path, net, "b" * 64, [images])
    with pytest.raises(DeployError, match="other images"):
        CalibrationStatistics.load(path, net, "a" * 64, [images * 0.5])


def test_no_images_are_an_error() -> None:
    with pytest.raises(DeployError, match="no calibration images"):
        collect_statistics(fused_net(), [])
