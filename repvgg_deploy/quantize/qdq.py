"""The quantized net as an explicit Q/DQ graph: int8 weights, one scale a tensor of activations, float biases."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from repvgg_deploy.errors import GraphError
from repvgg_deploy.onnx_export import FloatLayers, Fp16Rounding, GraphOptions, add_conv, to_onnx
from repvgg_deploy.onnx_graph import GraphBuilder, OnnxGraph
from repvgg_deploy.quantize.bias_range import FP16_ROOM, rescale, smallest_scale
from repvgg_deploy.quantize.codes import LOWEST, Target
from repvgg_deploy.quantize.constant_channels import count_constants, make_constants, read_constants
from repvgg_deploy.quantize.edges import CLASSIFIER, POOL
from repvgg_deploy.quantize.quantized_net import QuantizedNet

FP16_SCALES_OPSET = 19
"""From this opset on QuantizeLinear takes float16 scales."""


@dataclass
class IntegerLayers:
    """Layers with Q/DQ in front of their inputs; see `repvgg_deploy.onnx_export.Layers`.

    The pairs stand behind the ReLU, where TensorRT fuses them into the convolution's kernel, and where the saturation
    of an unsigned pair is the ReLU in ONNX Runtime (see `repvgg_deploy.quantize.codes`). So that every operator is an
    integer one there, a pair also stands on both sides of the Flatten, and the classifier's bias is an Add of its own:
    a Gemm with a float bias stays float.
    """

    net: QuantizedNet
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    rounding: Fp16Rounding = field(default_factory=Fp16Rounding)

    def __post_init__(self) -> None:
        self.floats = FloatLayers(self.dtype, self.rounding)
        names = [name for name, _ in self.net.float_net.named_blocks()]
        self.readers = dict(zip(names, [*names[1:], POOL], strict=True))

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        """Q/DQ of the input, DQ of the weights, Conv."""
        block = name.removesuffix(".conv")
        layer = self.net.integer_layer(block)
        if layer is None:
            return self.floats.conv(g, name, conv, x)
        x = self._rounded(g, block, f"{block}.input", x, layer.input_scale)
        weight, scale, bias = layer.weight, layer.weight_scale, layer.bias
        if block in self.net.wide:
            weight = read_constants(weight)
        reader = self.net.integer_layer(self.readers[block]) if self.readers[block] in self.net.wide else None
        if reader is not None:
            count = count_constants(reader.weight)
            weight, scale, bias = make_constants(weight, scale, bias, layer.input_scale, reader.input_scale, count)
        bias_name = self.floats.value(g, f"{name}.bias", bias)
        return add_conv(g, name, conv, [x, self._weight(g, name, weight, scale), bias_name])

    def relu(self, g: GraphBuilder, name: str, x: str) -> str:
        """A Relu; nothing where the rounding behind it saturates at what stands for 0."""
        return x if self.readers[name] in self.net.wide else self.floats.relu(g, name, x)

    def pool(self, g: GraphBuilder, name: str, x: str) -> str:
        """Q/DQ in front of the global average pool, and behind it, in front of the classifier."""
        if self.net.pool_scale is not None:
            x = self._rounded(g, POOL, f"{name}.input", x, self.net.pool_scale)
        x = self.floats.pool(g, name, x)
        classifier = self.net.integer_layer(CLASSIFIER)
        return x if classifier is None else self._rounded(g, CLASSIFIER, f"{name}.output", x, classifier.input_scale)

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        """DQ of the weights, Gemm; the pair in front of it once more where the Flatten has parted them."""
        layer = self.net.integer_layer(CLASSIFIER)
        if layer is None:
            return self.floats.linear(g, name, linear, x)
        weight = self._weight(g, name, layer.weight, layer.weight_scale)
        bias = self.floats.value(g, f"{name}.bias", layer.bias)
        x = self._rounded(g, CLASSIFIER, f"{name}.input", x, layer.input_scale)
        return g.add("Add", [g.add("Gemm", [x, weight], f"{name}.product", transB=1), bias], name)

    def _rounded(self, g: GraphBuilder, edge: str, name: str, x: str, scale: Tensor) -> str:
        scale_name = g.weight(f"{name}.scale", np.asarray(float(scale), dtype=self.dtype))
        zero = g.weight(f"{name}.zero_point", self._zero_point(edge))
        x = g.add("QuantizeLinear", [x, scale_name, zero], f"{name}.quantized")
        return g.add("DequantizeLinear", [x, scale_name, zero], f"{name}.dequantized")

    def _zero_point(self, edge: str) -> NDArray[np.integer]:
        if edge not in self.net.unsigned or edge in self.net.wide:
            return np.zeros((), np.int8)
        return np.full((), LOWEST, np.int8) if self.net.target is Target.ONNXRUNTIME else np.zeros((), np.uint8)

    def _weight(self, g: GraphBuilder, name: str, weight: Tensor, scale: Tensor) -> str:
        integers = g.weight(f"{name}.weight", weight.cpu().numpy())
        scales = g.weight(f"{name}.weight.scale", scale.cpu().numpy().astype(self.dtype))
        zero = g.weight(f"{name}.weight.zero_point", np.zeros(len(scale), np.int8))
        return g.add("DequantizeLinear", [integers, scales, zero], f"{name}.weight.dequantized", axis=0)


def to_qdq_onnx(
    net: QuantizedNet,
    options: GraphOptions,
    metadata: Mapping[str, str],
    dtype: np.dtype[Any] | None = None,
) -> OnnxGraph:
    """The Q/DQ graph of `net`, simplified and checked; inputs and outputs as `repvgg_deploy.onnx_export.to_onnx`.

    Args:
        net: on the CPU.
        options: of the graph.
        metadata: see `make_metadata`.
        dtype: float32 (default) or float16, of the scales, the biases and everything that is not int8.

    Raises:
        GraphError: the opset is too old for float16 scales, or what stays float does not fit float16.
    """
    dtype = np.dtype(np.float32) if dtype is None else dtype
    if dtype == np.float16:
        if options.opset < FP16_SCALES_OPSET:
            raise GraphError(f"opset {options.opset} has no float16 scales", f"--opset {FP16_SCALES_OPSET} or later")
        net = with_fp16_scales(net)
    layers = IntegerLayers(net, dtype)
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
    for name, reader in zip([*names, CLASSIFIER], [*names[1:], POOL, None], strict=True):
        if name not in layers:
            continue
        layer = layers[name]
        lowered = -LOWEST * layers[reader].input_scale if reader in rounded.wide and reader is not None else 0.0
        room = smallest_scale(layer.bias, layer.input_scale, lowered, FP16_ROOM)
        wanted = _round_to_half(torch.maximum(layer.weight_scale, room))
        layer.weight.copy_(rescale(layer.weight, layer.weight_scale, wanted))
        layer.weight_scale.copy_(wanted)
    return rounded


def _round_to_half(scale: Tensor) -> Tensor:
    """`scale` itself, rounded in place."""
    return scale.copy_(scale.half().float().clamp_min(2.0**-24))
