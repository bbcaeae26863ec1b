"""The quantized net as an explicit Q/DQ graph: int8 weights, one scale per activation tensor, float biases."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import GraphBuilder, OnnxGraph
from repvgg_deploy.graphs.layers import FloatLayers, Fp16Rounding, add_conv
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.nets.activations import Activation
from repvgg_deploy.quantization.bias_headroom import FP16_ROOM, rescale, smallest_scale
from repvgg_deploy.quantization.net import IntegerLayer, QuantizedNet
from repvgg_deploy.quantization.pair_sums import INT16_MAX, largest_pair_sum
from repvgg_deploy.quantization.points import CLASSIFIER, POOL

ActivationType = Literal["uint8", "int8"]

FP16_SCALES_OPSET = 19
"""From this opset on QuantizeLinear takes float16 scales."""


@dataclass
class IntegerLayers:
    """Layers with Q/DQ before their inputs; see `repvgg_deploy.graphs.repvgg.Layers`.

    The pairs stand after the ReLU, where TensorRT fuses them into the convolution's kernel, and where the saturation
    of an unsigned pair is the ReLU in ONNX Runtime (see `repvgg_deploy.quantization.target`). So that every
    operator is an integer one there, a pair also stands on both sides of the Flatten, and the classifier's bias is an
    Add of its own: a Gemm with a float bias stays float.
    """

    net: QuantizedNet
    activation_type: ActivationType = "uint8"
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    rounding: Fp16Rounding = field(default_factory=Fp16Rounding)

    def __post_init__(self) -> None:
        self.floats = FloatLayers(self.dtype, self.rounding)

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        """Q/DQ of the input, DQ of the weights, Conv."""
        block = name.removesuffix(".conv")
        layer = self.net.integer_layer(block)
        if layer is None:
            return self.floats.conv(g, name, conv, x)
        x = self._rounded(g, block, f"{block}.input", x, layer.input_scale)
        bias = self.floats.value(g, f"{name}.bias", layer.bias)
        return add_conv(g, name, conv, [x, self._weight(g, name, layer), bias])

    def activate(self, g: GraphBuilder, name: str, activation: Activation, x: str) -> str:
        """The activation's own nodes."""
        return self.floats.activate(g, name, activation, x)

    def read_map(self, g: GraphBuilder, reader: str | None, x: str) -> str:
        """The map as the block after it reads it; Q/DQ of the last one."""
        if reader is None:
            scale = self.net.pool_scale
            return x if scale is None else self._rounded(g, POOL, "pool.input", x, scale)
        return x if self.net.integer_layer(reader) is None else f"{reader}.input.dequantized"

    def pool(self, g: GraphBuilder, name: str, x: str) -> str:
        """Q/DQ before the global average pool, and after it, before the classifier."""
        x = self.floats.pool(g, name, self.read_map(g, None, x))
        classifier = self.net.integer_layer(CLASSIFIER)
        return x if classifier is None else self._rounded(g, CLASSIFIER, f"{name}.output", x, classifier.input_scale)

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        """DQ of the weights, Gemm; the pair before it once more where the Flatten has parted them."""
        layer = self.net.integer_layer(CLASSIFIER)
        if layer is None:
            return self.floats.linear(g, name, linear, x)
        weight = self._weight(g, name, layer)
        bias = self.floats.value(g, f"{name}.bias", layer.bias)
        x = self._rounded(g, CLASSIFIER, f"{name}.input", x, layer.input_scale)
        return g.add("Add", [g.add("Gemm", [x, weight], f"{name}.product", transB=1), bias], name)

    def _rounded(self, g: GraphBuilder, point: str, name: str, x: str, scale: Tensor) -> str:
        scale_name = g.weight(f"{name}.scale", np.asarray(float(scale), dtype=self.dtype))
        zero = g.weight(f"{name}.zero_point", self._zero_point(point))
        x = g.add("QuantizeLinear", [x, scale_name, zero], f"{name}.quantized")
        return g.add("DequantizeLinear", [x, scale_name, zero], f"{name}.dequantized")

    def _zero_point(self, point: str) -> NDArray[np.integer]:
        unsigned = point in self.net.unsigned and self.activation_type == "uint8"
        return np.zeros((), np.uint8 if unsigned else np.int8)

    def _weight(self, g: GraphBuilder, name: str, layer: IntegerLayer) -> str:
        largest = largest_pair_sum(layer.weight)
        if largest > INT16_MAX:
            raise GraphError(
                f"two products of {name} may add up to {largest}, which does not fit 16 bits",
                "quantize() never makes such weights; see repvgg_deploy.quantization.pair_sums",
            )
        integers = g.weight(f"{name}.weight", layer.weight.cpu().numpy())
        scales = g.weight(f"{name}.weight.scale", layer.weight_scale.cpu().numpy().astype(self.dtype))
        zero = g.weight(f"{name}.weight.zero_point", np.zeros(len(layer.weight), np.int8))
        return g.add("DequantizeLinear", [integers, scales, zero], f"{name}.weight.dequantized", axis=0)


def to_qdq_onnx(
    net: QuantizedNet,
    options: GraphOptions,
    metadata: Mapping[str, str],
    dtype: np.dtype[Any] | None = None,
    activation_type: ActivationType = "uint8",
) -> OnnxGraph:
    """The Q/DQ graph of `net`, simplified and checked; inputs and outputs as `repvgg_deploy.graphs.repvgg.to_onnx`.

    Args:
        net: on the CPU.
        options: of the graph.
        metadata: see `make_metadata`.
        dtype: float32 (default) or float16, of the scales, the biases and everything that is not int8.
        activation_type: of the zero-points after a ReLU. `int8` is for TensorRT before 10.10, whose parser refuses
            uint8 ones; the integers are the same, and ONNX Runtime then runs the convolutions in float.

    Raises:
        GraphError: the opset is too old for float16 scales, what stays float does not fit float16, or a sum of two
            products does not fit 16 bits.
    """
    dtype = np.dtype(np.float32) if dtype is None else dtype
    if dtype == np.float16:
        if options.opset < FP16_SCALES_OPSET:
            raise GraphError(f"opset {options.opset} has no float16 scales", f"--opset {FP16_SCALES_OPSET} or later")
        net = with_fp16_scales(net)
    layers = IntegerLayers(net, activation_type, dtype)
    graph = to_onnx(net.float_net, layers, options, metadata)
    if layers.rounding.overflowed:
        name, largest = next(iter(layers.rounding.overflowed.items()))
        raise GraphError(f"{name} reaches {largest:.3g}, which does not fit FP16", "keep float32 for what is not int8")
    return graph


def as_tensorrt_reads(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a Q/DQ graph in which uint8 zero-points are int8, which is how TensorRT's parser takes them.

    It computes what an engine computes; ONNX Runtime runs it in float between the pairs.
    """
    read = onnx.ModelProto()
    read.CopyFrom(model)
    zero_points = {n.input[2] for n in read.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for item in read.graph.initializer:
        if item.name in zero_points and item.data_type == onnx.TensorProto.UINT8:
            values = numpy_helper.to_array(item).astype(np.int8)
            item.CopyFrom(numpy_helper.from_array(values, item.name))
    return read


def with_fp16_scales(net: QuantizedNet) -> QuantizedNet:
    """A copy of `net` whose scales are float16 numbers, and whose int8 weights are rounded anew to those.

    Scales below the normal range of float16 lose precision there; they are taken as they are. Filters whose bias would
    be more than float16 holds, in units of their sums, get a larger scale.
    """
    rounded = copy.deepcopy(net)
    names = [name for name, _ in rounded.float_net.named_blocks()]
    layers = {name: layer for name in [*names, CLASSIFIER] if (layer := rounded.integer_layer(name)) is not None}
    for layer in layers.values():
        _round_to_half(layer.input_scale)
    if rounded.pool_scale is not None:
        _round_to_half(rounded.pool_scale)
    for layer in layers.values():
        # After the inputs' scales: a bias is counted in units of both.
        room = smallest_scale(layer.bias, layer.input_scale, FP16_ROOM)
        wanted = _round_to_half(torch.maximum(layer.weight_scale, room))
        layer.weight.copy_(rescale(layer.weight, layer.weight_scale, wanted))
        layer.weight_scale.copy_(wanted)
    return rounded


def _round_to_half(scale: Tensor) -> Tensor:
    """`scale` itself, rounded in place."""
    # The smallest float16 above 0: a scale of 0 would make NaN of every value.
    return scale.copy_(scale.half().float().clamp_min(2.0**-24))
