"""Weight scales that leave room for the biases: an integer convolution holds its bias as int32, in units of its sums.

A filter of zeros, or nearly so, would get a scale so small that its bias is more of those units than an int32 holds.
ONNX Runtime then computes something else than the graph says.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantize.codes import LOWEST, Target, wide_edges
from repvgg_deploy.quantize.edges import fused_blocks, per_channel
from repvgg_deploy.quantize.reconstruct import LayerIntegers, Reconstruction
from repvgg_deploy.quantize.weight_scales import LEVELS

INT32_ROOM = 2.0**30
"""Most of a bias in units of the sums. The sums themselves stay below it up to 33,000 columns; together they fit int32.
"""
FP16_ROOM = 6e4
"""The same where the bias is float16: ONNX Runtime casts the quotient to that, of which 65,504 is the largest."""


def make_room_for_biases(net: RepVGG, result: Reconstruction, target: Target) -> Reconstruction:
    """`result` with larger scales, and integers rounded anew, for those filters whose bias would not fit int32.

    A weight moves by half a step of the new scale at most: in units of the bias, 2⁻³¹ for each step of its input.
    """
    names = [name for name, _ in fused_blocks(net)]
    readers = dict(pairwise(names))
    wide = wide_edges(net, target, result.float_layers(net))
    layers = {}
    for name, layer in result.layers.items():
        reader = readers.get(name)
        # Outputs of a wide edge are held lower, and that goes into the bias as well.
        lowered = -LOWEST * result.layers[reader].input_scale if reader in wide and reader is not None else 0.0
        layers[name] = _make_room(layer, lowered)
    return replace(result, layers=layers)


def _make_room(layer: LayerIntegers, lowered: float) -> LayerIntegers:
    smallest = smallest_scale(layer.bias, layer.input_scale, lowered, INT32_ROOM)
    scale = torch.maximum(layer.weight_scale, smallest)
    return replace(layer, weight=rescale(layer.weight, layer.weight_scale, scale), weight_scale=scale)


def smallest_scale(bias: Tensor, input_scale: Tensor | float, lowered: Tensor | float, room: float) -> Tensor:
    """The scale of each filter (filters) with which its bias, `lowered` taken away, is at most `room` units."""
    return (bias.abs() + lowered) / (input_scale * room)


def rescale(weight: Tensor, scale: Tensor, wanted: Tensor) -> Tensor:
    """int8 `weight` with the scales `wanted` (filters) in place of `scale` (filters)."""
    return (weight * per_channel(scale / wanted, weight)).round().clamp(-LEVELS, LEVELS).to(torch.int8)
