"""The planted faults of the INT8 benchmark: they are there, and the net computes what it computed."""

from __future__ import annotations

import pytest
import torch
from int8_plants import CASES, SPARE, USUAL_CASES, plant_damage, plant_heavy_tails
from small_nets import logits_of, relative
from test_quantize_preparation import draw_images, fused_net

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantize.edges import fused_blocks

HEAVY = next(case for case in USUAL_CASES if case.startswith("heavy tails"))


def plant(case: str, net: RepVGG) -> RepVGG:
    return CASES[case](net, draw_images(256).numpy())


@pytest.mark.parametrize("case", [case for case in USUAL_CASES if case != HEAVY])
def test_a_planted_net_computes_what_it_computed(case: str) -> None:
    net, images = fused_net(), draw_images(8, seed=9)
    before = [block.conv.weight.clone() for _, block in fused_blocks(net)]
    planted = plant(case, net)
    # A constant channel's share goes through float32 as a difference of large numbers.
    assert relative(logits_of(planted, images), logits_of(net, images)) < 1e-4
    assert all(torch.equal(a, block.conv.weight) for a, (_, block) in zip(before, fused_blocks(net), strict=True))


@pytest.mark.parametrize("factor", [316.0, 1500.0])
def test_outliers_stand_in_filters_that_are_alive(factor: float) -> None:
    net = fused_net()
    cases = [case for case in USUAL_CASES if f"γ/σ {factor:.0f}" in case]
    assert cases
    for case in cases:
        found = 0
        for (_, block), (_, was) in zip(fused_blocks(plant(case, net)), fused_blocks(net), strict=True):
            weight = block.conv.weight[: was.conv.out_channels, was.conv.in_channels :]
            found += int((weight == factor).sum())
        assert found > 0
        assert found % SPARE == 0


def test_the_other_weights_make_up_for_heavy_tails() -> None:
    net, images, share, factor = fused_net(), draw_images(256), 0.01, 10.0
    planted = plant_heavy_tails(net, images.numpy(), share, factor)
    damaged = plant_damage(net, share, factor)
    for blocks in zip(*(fused_blocks(each) for each in (net, planted, damaged)), strict=True):
        was, made_up, raw = (block.conv.weight for _, block in blocks)
        heavy = raw != was
        torch.testing.assert_close(made_up[heavy], was[heavy] * factor)
    unseen = draw_images(32, seed=9)
    exact = logits_of(net, unseen)
    assert relative(logits_of(planted, unseen), exact) < 0.7 * relative(logits_of(damaged, unseen), exact)
