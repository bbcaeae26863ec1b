"""The planted faults of the INT8 benchmark: they are there, and the net computes what it computed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers.quantized_nets import SHAPES, draw_images, fused_net
from helpers.small_nets import logits_of, relative
from int8_bench.faults import CASES, HEAVY, SPARE, USUAL_CASES, plant_damage, plant_heavy_tails

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.points import fused_blocks, walk


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


@pytest.mark.parametrize("case", [case for case in USUAL_CASES if "γ/σ" in case])
def test_outliers_stand_in_filters_that_are_alive_and_read_channels_that_are_not(case: str) -> None:
    net, images = fused_net(), draw_images(8, seed=9)
    planted = plant(case, net)
    values = dict(walk(planted, images))
    factor = 1500.0 if "1500" in case else 316.0
    for (name, block), was in zip(fused_blocks(planted), net.spec.blocks, strict=True):
        outliers = (block.conv.weight[: was.out_channels, was.in_channels :] == factor).nonzero()
        assert len(outliers) == (SPARE if was.can_skip else 0)
        spare = values[name][:, was.in_channels :]
        if not was.can_skip:
            continue
        if case.startswith("dead"):
            assert not spare.any()
        elif case.startswith("constant"):
            assert (spare == 0.5).all()
        else:
            assert 0 < spare.max() < 1e-3 * values[name].max()


@pytest.mark.slow
def test_the_strong_channel_is_stronger() -> None:
    net, images = fused_net(), draw_images(8, seed=9)
    before, after = (dict(walk(each, images)) for each in (net, plant("one channel 1000 x", net)))
    for _, (name, _) in pairwise(fused_blocks(net)):
        torch.testing.assert_close(after[name][:, 0], 1000 * before[name][:, 0], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(after[name][:, 1:], before[name][:, 1:], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_other_weights_make_up_for_heavy_tails() -> None:
    net, images, share, factor = fused_net(), draw_images(256), 0.01, 10.0
    planted = plant_heavy_tails(net, images.numpy(), share, factor)
    damaged = plant_damage(net, share, factor)
    found = 0
    for blocks in zip(*(fused_blocks(each) for each in (net, planted, damaged)), strict=True):
        was, made_up, raw = (block.conv.weight for _, block in blocks)
        heavy = raw != was
        found += int(heavy.sum())
        torch.testing.assert_close(made_up[heavy], was[heavy] * factor)
    assert found > 50
    unseen = draw_images(32, seed=9)
    exact = logits_of(net, unseen)
    assert relative(logits_of(planted, unseen), exact) < 0.25 * relative(logits_of(damaged, unseen), exact)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "plain"])
@pytest.mark.parametrize("case", USUAL_CASES[1:])
def test_nets_with_groups_and_squeeze_excites_are_refused(case: str, shape: str) -> None:
    with pytest.raises(ValueError, match="without groups"):
        plant(case, fused_net(shape))
