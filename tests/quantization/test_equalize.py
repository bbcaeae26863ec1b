"""Equalization: the same net, with even ranges of channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.quantized_nets import SHAPES, draw_images, fused_net
from helpers.small_nets import logits_of, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_deploy.quantization import Recipe
from repvgg_deploy.quantization.equalize import equalize
from repvgg_deploy.quantization.points import fused_blocks
from repvgg_deploy.quantization.state import QuantizationState
from repvgg_deploy.quantization.statistics import collect_statistics


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_equalization_does_not_change_what_the_net_computes(shape: str, seed: int, exponent: float) -> None:
    net, images = fused_net(shape, seed), draw_images(8)
    before = logits_of(net, images)
    given = QuantizationState(net, collect_statistics(net, [images]), Recipe("a test's", equalize=exponent))
    state = equalize(given)
    assert relative(logits_of(state.net, images), before) < 2e-6
    assert any((f - 1).abs().max() > 0.01 for f in state.factors.values())


def test_equalization_evens_out_one_channel_that_is_a_thousand_times_its_neighbours() -> None:
    net, images = fused_net(), draw_images()
    (_, first), (name, second) = fused_blocks(net)[:2]
    with torch.no_grad():
        first.conv.weight[3] *= 1000
        first.conv.bias[3] *= 1000
        second.conv.weight[:, 3] /= 1000
    before = collect_statistics(net, [images])
    after = collect_statistics(equalize(QuantizationState(net, before, Recipe("a test's", equalize=0.5))).net, [images])
    spread = [s.points[name].largest.max() / np.median(s.points[name].largest) for s in (before, after)]
    assert spread[0] > 100
    assert spread[1] < 10
