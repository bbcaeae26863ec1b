"""Dead inputs: their columns go, and the net computes the same."""

from __future__ import annotations

import torch
from helpers.quantized_nets import draw_images, fused_net, kill_channel
from helpers.small_nets import logits_of, relative

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization import Recipe
from repvgg_deploy.quantization.dead_inputs import remove_dead_inputs
from repvgg_deploy.quantization.points import fused_blocks, walk
from repvgg_deploy.quantization.state import QuantizationState
from repvgg_deploy.quantization.statistics import collect_statistics


def start(net: RepVGG, images: torch.Tensor, share: float | None) -> QuantizationState:
    return QuantizationState(net, collect_statistics(net, [images]), Recipe("a test's", dead_inputs=share))


def test_columns_of_dead_inputs_are_removed_and_the_net_computes_the_same() -> None:
    net, images = fused_net(), draw_images()
    kill_channel(net, 1, 2, 1500.0)
    before = logits_of(net, images)
    state = remove_dead_inputs(start(net, images, 0.0))
    name, block = fused_blocks(state.net)[2]
    assert state.removed[name].channels == 1
    assert state.removed[name].bound == 0.0
    assert float(block.conv.weight[2, 2, 1, 1]) == 0.0
    assert torch.equal(logits_of(state.net, images), before)


def test_the_stated_bound_holds_for_nearly_dead_inputs() -> None:
    net, images = fused_net(), draw_images()
    blocks = fused_blocks(net)
    with torch.no_grad():
        blocks[1][1].conv.weight[2] *= 1e-9
        blocks[1][1].conv.bias[2] = 1e-9
        blocks[2][1].conv.weight[2, 2, 1, 1] = 1500.0
    state = remove_dead_inputs(start(net, images, 1e-3))
    name, before = blocks[2]
    removed = state.removed[name]
    assert removed.columns >= 1
    assert 0 < removed.bound <= 1e-3
    x = dict(walk(net, images))[name].double()
    old, new = (b.conv.double()(x) for b in (before, fused_blocks(state.net)[2][1]))
    assert float((old - new).abs().max()) <= removed.bound * float(old.square().mean((0, 2, 3)).sqrt().max()) * 2


def test_an_enormous_weight_on_a_constant_input_becomes_a_bias() -> None:
    net, images = fused_net(), draw_images()
    blocks = fused_blocks(net)
    with torch.no_grad():
        blocks[1][1].conv.weight[2] = 0
        blocks[1][1].conv.bias[2] = 0.5
        blocks[2][1].conv.weight[2, 2, 1, 1] = 316.0
        blocks[2][1].conv.bias[2] -= 158.0
    before = logits_of(net, images)
    state = remove_dead_inputs(start(net, images, 1e-3))
    assert state.removed[blocks[2][0]].columns == 1
    assert float(fused_blocks(state.net)[2][1].conv.weight[2, 2, 1, 1]) == 0.0
    assert relative(logits_of(state.net, images), before) < 1e-5


def test_without_a_dead_input_nothing_is_removed() -> None:
    net, images = fused_net(), draw_images()
    after = remove_dead_inputs(start(net, images, 1e-3)).net
    for (_, before), (_, block) in zip(fused_blocks(net), fused_blocks(after), strict=True):
        assert torch.equal(block.conv.weight, before.conv.weight)
    state = start(net, images, None)
    assert remove_dead_inputs(state) is state
