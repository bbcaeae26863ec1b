"""The quantized net as an explicit Q/DQ graph: int8 weights, per-tensor symmetric activations, float biases."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from repvgg_deploy.errors import GraphError
from repvgg_deploy.onnx_export import FloatLayers, Fp16Rounding, GraphOptions, add_conv, to_onnx
from repvgg_deploy.onnx_graph import GraphBuilder, OnnxGraph
from repvgg_deploy.quantize.edges import CLASSIFIER, edge_names, fused_blocks
from repvgg_deploy.quantize.quantized_net import IntegerLayer, QuantizedNet, is_plain

FP16_SCALES_OPSET = 19
"""From this opset on QuantizeLinear takes float16 scales."""


class Placement(str, Enum):
    """Where the Q/DQ pairs stand; the integers that flow are the same.

    `both`: in front of the ReLU and behind it, with one scale, and on both sides of the Flatten. ONNX Runtime makes an
    integer operator only where a DequantizeLinear stands directly in front and a QuantizeLinear directly behind. The
    ReLU is a LeakyRelu of slope 0, of which it has an integer kernel, and the classifier's bias an Add of its own,
    which lets the Gemm be one. TensorRT takes all that as well. `after_relu`: behind the ReLU only, which is what
    TensorRT fuses into one kernel; ONNX Runtime then computes in float.
    """

    BOTH = "both"
    AFTER_RELU = "after_relu"


@dataclass
class IntegerLayers:
    """Layers with Q/DQ in front of their inputs; see `repvgg_deploy.onnx_export.Layers`."""

    net: QuantizedNet
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    placement: Placement = Placement.BOTH
    rounding: Fp16Rounding = field(default_factory=Fp16Rounding)

    def __post_init__(self) -> None:
        self.floats = FloatLayers(self.dtype, self.rounding)
        names = edge_names(self.net.float_net)
        self.readers: Mapping[str, str] = dict(pairwise(names))
        self.blocks = dict(fused_blocks(self.net.float_net))

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        """Q/DQ of the input, DQ of the weights, Conv; and Q/DQ of the output where only the ReLU follows."""
        block = name.removesuffix(".conv")
        layer = self.net.integer_layer(block)
        if layer is None:
            return self.floats.conv(g, name, conv, x)
        x = self._rounded(g, f"{block}.input", x, layer.input_scale)
        weight = self._weight(g, name, layer)
        x = add_conv(g, name, conv, [x, weight, self.floats.value(g, f"{name}.bias", layer.bias)])
        scale = self._output_scale(block)
        return x if scale is None else self._rounded(g, f"{block}.output", x, scale)

    def relu(self, g: GraphBuilder, name: str, x: str) -> str:
        """A Relu node, or the LeakyRelu that does the same between two pairs."""
        if self._output_scale(name.removesuffix(".relu")) is None:
            return self.floats.relu(g, name, x)
        return g.add("LeakyRelu", [x], name, alpha=0.0)

    def pool(self, g: GraphBuilder, name: str, x: str) -> str:
        """Q/DQ in front of the global average pool, and behind it, in front of the classifier."""
        if self.net.pool_scale is not None:
            x = self._rounded(g, f"{name}.input", x, self.net.pool_scale)
        x = self.floats.pool(g, name, x)
        classifier = self.net.integer_layer(CLASSIFIER)
        return x if classifier is None else self._rounded(g, f"{CLASSIFIER}.input", x, classifier.input_scale)

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        """DQ of the weights, Gemm; the pair in front of it once more where the Flatten has parted them."""
        layer = self.net.integer_layer(CLASSIFIER)
        if layer is None:
            return self.floats.linear(g, name, linear, x)
        weight = self._weight(g, name, layer)
        bias = self.floats.value(g, f"{name}.bias", layer.bias)
        if self.placement is not Placement.BOTH:
            return g.add("Gemm", [x, weight, bias], name, transB=1)
        x = self._rounded(g, f"{name}.features", x, layer.input_scale)
        return g.add("Add", [g.add("Gemm", [x, weight], f"{name}.product", transB=1), bias], name)

    def _output_scale(self, block: str) -> Tensor | None:
        """The scale of the edge behind `block`, where its integers can be made in front of the ReLU as well."""
        if self.placement is not Placement.BOTH or not is_plain(self.blocks[block]):
            return None
        return None if self.net.integer_layer(block) is None else self.net.edge_scale(self.readers[block])

    def _rounded(self, g: GraphBuilder, name: str, x: str, scale: Tensor) -> str:
        scale_name = g.weight(f"{name}.scale", np.asarray(float(scale), dtype=self.dtype))
        zero = g.weight(f"{name}.zero_point", np.zeros((), np.int8))
        x = g.add("QuantizeLinear", [x, scale_name, zero], f"{name}.quantized")
        return g.add("DequantizeLinear", [x, scale_name, zero], f"{name}.dequantized")

    def _weight(self, g: GraphBuilder, name: str, layer: IntegerLayer) -> str:
        weight = g.weight(f"{name}.weight", layer.weight.cpu().numpy())
        scale = g.weight(f"{name}.weight.scale", layer.weight_scale.cpu().numpy().astype(self.dtype))
        zero = g.weight(f"{name}.weight.zero_point", np.zeros(len(layer.weight_scale), np.int8))
        return g.add("DequantizeLinear", [weight, scale, zero], f"{name}.weight.dequantized", axis=0)


def to_qdq_onnx(
    net: QuantizedNet,
    options: GraphOptions,
    metadata: Mapping[str, str],
    dtype: np.dtype[Any] | None = None,
    placement: Placement = Placement.BOTH,
) -> OnnxGraph:
    """The Q/DQ graph of `net`, simplified and checked; inputs and outputs as `repvgg_deploy.onnx_export.to_onnx`.

    Args:
        net: on the CPU.
        options: of the graph.
        metadata: see `make_metadata`.
        dtype: float32 (default) or float16, of the scales, the biases and everything that is not int8.
        placement: see `Placement`.

    Raises:
        GraphError: the opset is too old for float16 scales, or what stays float does not fit float16.
    """
    dtype = np.dtype(np.float32) if dtype is None else dtype
    if dtype == np.float16:
        if options.opset < FP16_SCALES_OPSET:
            raise GraphError(f"opset {options.opset} has no float16 scales", f"--opset {FP16_SCALES_OPSET} or later")
        net = with_fp16_scales(net)
    layers = IntegerLayers(net, dtype, placement)
    graph = to_onnx(net.float_net, layers, options, metadata)
    if layers.rounding.overflowed:
        name, largest = next(iter(layers.rounding.overflowed.items()))
        raise GraphError(f"{name} reaches {largest:.3g}, which does not fit FP16", "keep float32 for what is not int8")
    return graph


def with_fp16_scales(net: QuantizedNet) -> QuantizedNet:
    """A copy of `net` whose scales are float16 numbers, and whose int8 weights are rounded anew to those.

    Scales below the normal range of float16 lose precision there; they are taken as they are.
    """
    rounded = copy.deepcopy(net)
    for layer in rounded.layers.values():
        integer = cast(IntegerLayer, layer)
        half = integer.weight_scale.half().float().clamp_min(2.0**-24)
        ratio = integer.weight_scale / half
        shape = (-1, *[1] * (integer.weight.dim() - 1))
        integer.weight.copy_((integer.weight * ratio.reshape(shape)).round().clamp(-127, 127).to(torch.int8))
        integer.weight_scale.copy_(half)
        integer.input_scale.copy_(integer.input_scale.half().float().clamp_min(2.0**-24))
    if rounded.pool_scale is not None:
        rounded.pool_scale.copy_(rounded.pool_scale.half().float().clamp_min(2.0**-24))
    return rounded
