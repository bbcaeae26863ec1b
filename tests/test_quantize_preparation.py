"""The steps in front of rounding: statistics, dead inputs, equalization."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import logits_of, make_net, relative

from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.spec import SqueezeExcite
from repvgg_deploy.quantization.dead_inputs import remove_dead_inputs
from repvgg_deploy.quantization.equalize import equalize
from repvgg_deploy.quantization.points import edge_names, fused_blocks, rebatch, walk
from repvgg_deploy.quantization.statistics import CalibrationStatistics, collect_statistics

SHAPES = {
    "plain": {},
    "grouped": {"groups": 2},
    "se before": {"squeeze_excite": SqueezeExcite(4, "before")},
    "se after": {"squeeze_excite": SqueezeExcite(4, "after")},
}


def fused_net(shape: str = "plain", seed: int = 0) -> RepVGG:
    net = fuse(make_net(seed, **SHAPES[shape]))
    assert isinstance(net, RepVGG)
    return net.requires_grad_(False)


def draw_images(count: int = 40, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def in_batches(images: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(images.split(size))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_statistics_do_not_depend_on_the_batch_size(size: int) -> None:
    net, images = fused_net(), draw_images()
    reference = collect_statistics(net, in_batches(images, 32))
    other = collect_statistics(net, in_batches(images, size))
    assert other.images == 40
    assert other.images_sha256 == reference.images_sha256
    for name, edge in reference.edges.items():
        for key in ("lowest", "highest", "mean", "mean_square", "usual"):
            np.testing.assert_array_equal(getattr(other.edges[name], key), getattr(edge, key), err_msg=f"{name} {key}")


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


def test_statistics_are_those_of_the_values_on_each_edge() -> None:
    net = integer_net()
    images = torch.randint(-3, 4, (40, 3, 32, 32), generator=torch.Generator().manual_seed(3)).float()
    statistics = collect_statistics(net, [images])
    assert list(statistics.edges) == edge_names(net)
    for name, x in walk(net, images):
        assert torch.equal(x, x.round())
        assert 0 < x.abs().max() < 2**12
        edge, flat = statistics.edges[name], x.double().movedim(1, 0).flatten(1)
        np.testing.assert_array_equal(edge.lowest, flat.amin(1), err_msg=name)
        np.testing.assert_array_equal(edge.highest, flat.amax(1), err_msg=name)
        np.testing.assert_array_equal(edge.usual, flat.abs().amax(1), err_msg=name)
        # All sums are exact, and the numbers of pixels are powers of two; dividing by 40 images, or multiplying with
        # its rounded inverse, costs either side two roundings of 2⁻⁵³ at most.
        np.testing.assert_allclose(edge.mean, flat.mean(1), rtol=2**-51, err_msg=name)
        np.testing.assert_allclose(edge.mean_square, flat.square().mean(1), rtol=2**-51, err_msg=name)


def test_saved_statistics_come_back_for_the_same_checkpoint_and_images_only(tmp_path: Path) -> None:
    images = draw_images(4)
    statistics = collect_statistics(fused_net(), [images], sha256="a" * 64, views=2)
    path = tmp_path / "cache.npz"
    statistics.save(path)
    loaded = CalibrationStatistics.load(path, "a" * 64, images.split(3))
    assert loaded.edges.keys() == statistics.edges.keys()
    np.testing.assert_array_equal(loaded.edges["pool"].usual, statistics.edges["pool"].usual)
    with pytest.raises(DeployError, match="another checkpoint"):
        CalibrationStatistics.load(path, "b" * 64, [images])
    with pytest.raises(DeployError, match="other images"):
        CalibrationStatistics.load(path, "a" * 64, [images * 0.5])
    path.write_bytes(b"no npz")
    with pytest.raises(DeployError, match="no calibration cache"):
        CalibrationStatistics.load(path, "a" * 64, [images])


def test_no_images_are_an_error() -> None:
    with pytest.raises(DeployError, match="no calibration images"):
        collect_statistics(fused_net(), [])


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 8))
def test_rebatching_keeps_all_images_in_order(sizes: list[int], wanted: int) -> None:
    images = torch.arange(sum(sizes), dtype=torch.float32).reshape(-1, 1, 1, 1)
    out = list(rebatch(images.split(sizes), torch.device("cpu"), wanted))
    assert torch.equal(torch.cat(out), images)
    assert all(len(batch) == wanted for batch in out[:-1])


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_equalization_does_not_change_what_the_net_computes(shape: str, seed: int, exponent: float) -> None:
    net, images = fused_net(shape, seed), draw_images(8)
    before = logits_of(net, images)
    factors = equalize(net, collect_statistics(net, [images]), exponent)
    assert relative(logits_of(net, images), before) < 2e-6
    assert any((f - 1).abs().max() > 0.01 for f in factors.values())


def test_equalization_evens_out_one_channel_that_is_a_thousand_times_its_neighbours() -> None:
    net, images = fused_net(), draw_images()
    (_, first), (name, second) = fused_blocks(net)[:2]
    with torch.no_grad():
        first.conv.weight[3] *= 1000
        first.conv.bias[3] *= 1000
        second.conv.weight[:, 3] /= 1000
    before = collect_statistics(net, [images])
    equalize(net, before, 0.5)
    after = collect_statistics(net, [images])
    spread = [s.edges[name].largest.max() / np.median(s.edges[name].largest) for s in (before, after)]
    assert spread[0] > 100
    assert spread[1] < 10


def kill_channel(net: RepVGG, block: int, channel: int, outlier: float) -> None:
    """Make a channel dead, and give the next layer a huge weight on it, as γ/σ of a dead identity does."""
    blocks = fused_blocks(net)
    with torch.no_grad():
        blocks[block][1].conv.weight[channel] = 0
        blocks[block][1].conv.bias[channel] = -1
        blocks[block + 1][1].conv.weight[channel, channel, 1, 1] = outlier


def test_columns_of_dead_inputs_are_removed_and_the_net_computes_the_same() -> None:
    net, images = fused_net(), draw_images()
    kill_channel(net, 1, 2, 1500.0)
    before = logits_of(net, images)
    removed = remove_dead_inputs(net, collect_statistics(net, [images]), 0.0)
    name, block = fused_blocks(net)[2]
    assert removed[name].channels == 1
    assert removed[name].bound == 0.0
    assert float(block.conv.weight[2, 2, 1, 1]) == 0.0
    assert torch.equal(logits_of(net, images), before)


def test_the_stated_bound_holds_for_nearly_dead_inputs() -> None:
    net, images = fused_net(), draw_images()
    blocks = fused_blocks(net)
    with torch.no_grad():
        blocks[1][1].conv.weight[2] *= 1e-9
        blocks[1][1].conv.bias[2] = 1e-9
        blocks[2][1].conv.weight[2, 2, 1, 1] = 1500.0
    statistics = collect_statistics(net, [images])
    kept = copy.deepcopy(net)
    removed = remove_dead_inputs(net, statistics, 1e-3)
    name, block = blocks[2]
    assert removed[name].columns >= 1
    assert 0 < removed[name].bound <= 1e-3
    x = dict(walk(kept, images))[name].double()
    old, new = (b.conv.double()(x) for b in (fused_blocks(kept)[2][1], block))
    assert float((old - new).abs().max()) <= removed[name].bound * float(old.square().mean((0, 2, 3)).sqrt().max()) * 2


def test_an_enormous_weight_on_a_constant_input_becomes_a_bias() -> None:
    net, images = fused_net(), draw_images()
    blocks = fused_blocks(net)
    with torch.no_grad():
        blocks[1][1].conv.weight[2] = 0
        blocks[1][1].conv.bias[2] = 0.5
        blocks[2][1].conv.weight[2, 2, 1, 1] = 316.0
        blocks[2][1].conv.bias[2] -= 158.0
    before = logits_of(net, images)
    removed = remove_dead_inputs(net, collect_statistics(net, [images]), 1e-3)
    assert removed[blocks[2][0]].columns == 1
    assert float(blocks[2][1].conv.weight[2, 2, 1, 1]) == 0.0
    assert relative(logits_of(net, images), before) < 1e-5


def test_without_a_dead_input_nothing_is_removed() -> None:
    net, images = fused_net(), draw_images()
    before = {name: block.conv.weight.clone() for name, block in fused_blocks(net)}
    remove_dead_inputs(net, collect_statistics(net, [images]), 1e-3)
    for name, block in fused_blocks(net):
        assert torch.equal(block.conv.weight, before[name])
