"""Weight scales that leave room for the biases: an integer convolution holds its bias as int32, in units of its sums.

A filter of zeros, or nearly so, would get a scale so small that its bias is more of those units than an int32 holds.
ONNX Runtime then computes something else than the graph says.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from repvgg_deploy.quantization.pair_sums import count_taps, round_in_pairs
from repvgg_deploy.quantization.points import per_channel
from repvgg_deploy.quantization.state import LayerIntegers, QuantizationState, Reconstruction

INT32_ROOM = 2.0**30
"""Most of a bias in units of the sums. The sums themselves stay below it up to 33,000 columns; together they fit int32.
"""
FP16_ROOM = 6e4
"""The same where the bias is float16: ONNX Runtime casts the quotient to that, of which 65,504 is the largest."""


def make_room_for_biases(state: QuantizationState) -> QuantizationState:
    """Leave room for the biases, see `make_room`. Given: a `result`. Gives: one that every runtime computes alike."""
    return replace(state, result=make_room(state.integers))


def make_room(result: Reconstruction) -> Reconstruction:
    """`result` with larger scales, and integers rounded anew, for those filters whose bias would not fit int32.

    A weight moves by half a step of the new scale at most: in units of the bias, 2⁻³¹ for each step of its input.
    """
    return replace(result, layers={name: _make_room(layer) for name, layer in result.layers.items()})


def _make_room(layer: LayerIntegers) -> LayerIntegers:
    smallest = smallest_scale(layer.bias, layer.input_scale, INT32_ROOM)
    scale = torch.maximum(layer.weight_scale, smallest)
    return replace(layer, weight=rescale(layer.weight, layer.weight_scale, scale), weight_scale=scale)


def smallest_scale(bias: Tensor, input_scale: Tensor | float, room: float) -> Tensor:
    """The scale of each filter (filters) with which its bias is at most `room` units."""
    return bias.abs() / (input_scale * room)


def rescale(weight: Tensor, scale: Tensor, wanted: Tensor) -> Tensor:
    """int8 `weight` with the scales `wanted` (filters) instead of `scale` (filters)."""
    rows = (weight * per_channel(scale / wanted, weight)).flatten(1)
    return round_in_pairs(rows, count_taps(weight)).reshape(weight.shape).to(torch.int8)
