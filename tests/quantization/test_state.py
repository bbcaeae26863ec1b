"""The passes of quantization: each gives a new state, and leaves the one that it is given as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.quantized_nets import QUICK, draw_images, fused_net, kill_channel

from repvgg_deploy.quantization import collect_statistics
from repvgg_deploy.quantization.bias_headroom import make_room_for_biases
from repvgg_deploy.quantization.dead_inputs import remove_dead_inputs
from repvgg_deploy.quantization.equalize import equalize
from repvgg_deploy.quantization.learned_rounding import learn
from repvgg_deploy.quantization.recipe import LearningOptions
from repvgg_deploy.quantization.reconstruct import reconstruct
from repvgg_deploy.quantization.state import QuantizationState, Reconstruction

IMAGES = draw_images(8)
Pass = Callable[[QuantizationState], QuantizationState]
PASSES: dict[str, Pass] = {
    "dead inputs": remove_dead_inputs,
    "equalize": equalize,
    "reconstruct": lambda state: reconstruct(state, IMAGES),
    "learn": lambda state: learn(state, [IMAGES]),
    "biases": make_room_for_biases,
}


def tensors_of(state: QuantizationState) -> dict[str, torch.Tensor]:
    layers = {} if state.result is None else state.result.layers
    found = {
        f"{name} {part}": getattr(layers[name], part) for name in layers for part in ("weight", "weight_scale", "bias")
    }
    return {**state.net.state_dict(), **found}


def start() -> QuantizationState:
    net = fused_net()
    kill_channel(net, 1, 2, 1500.0)
    recipe = replace(QUICK, learning=LearningOptions(steps=2, batch=4))
    return QuantizationState(net, collect_statistics(net, [IMAGES]), recipe)


@pytest.mark.slow
def test_no_pass_changes_what_it_is_given_and_each_changes_what_it_gives() -> None:
    state = start()
    with torch.inference_mode(False):
        for name, run in PASSES.items():
            before = copy.deepcopy(tensors_of(state))
            after = run(state)
            assert all(torch.equal(value, before[key]) for key, value in tensors_of(state).items()), name
            changed = {
                key for key, value in tensors_of(after).items() if not torch.equal(value, before.get(key, -value))
            }
            assert changed or name == "biases"
            state = after
    assert isinstance(state.result, Reconstruction)
    assert state.removed
    assert state.factors


@pytest.mark.parametrize("run", [PASSES["learn"], PASSES["biases"]])
def test_passes_over_integers_come_after_those_that_make_them(run: Pass) -> None:
    with pytest.raises(AssertionError, match="comes before reconstruct"):
        run(start())
