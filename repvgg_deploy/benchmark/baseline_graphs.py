"""The nets to compare with as ONNX graphs: the same input, output, precisions and Q/DQ scheme as a fused RepVGG's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import nn

import repvgg_deploy
from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import GraphBuilder, OnnxGraph, make_graph
from repvgg_deploy.graphs.layers import FloatLayers, add_conv
from repvgg_deploy.graphs.repvgg import GraphOptions, add_input, add_output, check_options, describe_input
from repvgg_deploy.nets.baselines import BaselineNet, fold_batch_norms
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.resnet import ResidualBlock, ResNet
from repvgg_deploy.nets.vgg import Vgg
from repvgg_deploy.quantization.pair_sums import count_taps
from repvgg_deploy.quantization.rounding import choose_weight_scales, round_weights
from repvgg_deploy.runtime.onnxruntime import import_onnxruntime

Scales = Mapping[str, float]
"""The largest magnitude on a point, by the point's name."""


class BaselineLayers(Protocol):
    """How the layers of a net with skips and pools become nodes; see `repvgg_deploy.graphs.repvgg.Layers`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the tensors between the layers."""

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        """A convolution and its bias."""

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        """A linear layer."""

    def point(self, g: GraphBuilder, name: str, x: str, signed: bool = False) -> str:
        """A place where the activations are quantized in any case; `signed` where they may be negative."""

    def inner_point(self, g: GraphBuilder, name: str, x: str, signed: bool = False) -> str:
        """A place where the activations are quantized if every operator is to be an integer one by itself."""


@dataclass
class BaselineFloats(FloatLayers):
    """Layers in float32 or float16."""

    def point(self, g: GraphBuilder, name: str, x: str, signed: bool = False) -> str:  # noqa: ARG002
        """Nothing."""
        return x

    def inner_point(self, g: GraphBuilder, name: str, x: str, signed: bool = False) -> str:  # noqa: ARG002
        """Nothing."""
        return x


@dataclass
class BaselineIntegers:
    """Layers with int8 weights, one scale per filter, and Q/DQ pairs on the points, one symmetric scale per tensor.

    As in the RepVGG that it is compared with, the pairs stand after the ReLU and are unsigned there. `for_engine`
    leaves out those before a sum and those that only ONNX Runtime needs to make an integer operator.
    """

    ranges: Scales
    for_engine: bool = False
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))

    def __post_init__(self) -> None:
        self._floats = FloatLayers(self.dtype)

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        """DQ of the weights, Conv."""
        bias = self._floats.value(g, f"{name}.bias", cast(torch.Tensor, conv.bias))
        return add_conv(g, name, conv, [x, self._weight(g, name, conv.weight), bias])

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        """DQ of the weights, Gemm."""
        bias = self._floats.value(g, f"{name}.bias", linear.bias)
        weight = self._weight(g, name, linear.weight)
        if self.for_engine:
            return g.add("Gemm", [x, weight, bias], name, transB=1)
        return g.add("Add", [g.add("Gemm", [x, weight], f"{name}.product", transB=1), bias], name)

    def inner_point(self, g: GraphBuilder, name: str, x: str, signed: bool = False) -> str:
        """Q/DQ, or nothing for an engine."""
        return x if self.for_engine else self.point(g, name, x, signed)

    def point(self, g: GraphBuilder, name: str, x: str, signed: bool = False) -> str:
        """Q/DQ."""
        # A point that is 0 for the noise needs a scale all the same.
        scale = g.weight(f"{name}.scale", np.asarray(max(self.ranges[name], 1e-6) / 127, self.dtype))
        zero = g.weight(f"{name}.zero_point", np.zeros((), np.int8 if signed else np.uint8))
        x = g.add("QuantizeLinear", [x, scale, zero], f"{name}.quantized")
        return g.add("DequantizeLinear", [x, scale, zero], f"{name}.dequantized")

    def _weight(self, g: GraphBuilder, name: str, tensor: torch.Tensor) -> str:
        rows = tensor.detach().float().flatten(1)
        taps = count_taps(tensor)
        scales = choose_weight_scales(rows, taps)
        integers = round_weights(rows, scales, taps).to(torch.int8).reshape(tensor.shape)
        weight = g.weight(f"{name}.weight", integers.numpy())
        scale = g.weight(f"{name}.weight.scale", scales.numpy().astype(self.dtype))
        zero = g.weight(f"{name}.weight.zero_point", np.zeros(len(scales), np.int8))
        return g.add("DequantizeLinear", [weight, scale, zero], f"{name}.weight.dequantized", axis=0)


def to_baseline_onnx(
    net: BaselineNet, layers: BaselineLayers, options: GraphOptions, metadata: Mapping[str, str]
) -> OnnxGraph:
    """The simplified, checked ONNX graph of a baseline; its BNs are folded if they are not yet.

    Input and output as `repvgg_deploy.graphs.repvgg.to_onnx`.

    Raises:
        GraphError: an option does not fit the net or the opset; in FP16, a weight is out of range.
    """
    folded = fold_batch_norms(net)
    # The helpers ask a net for nothing but its input channels and classes.
    like, floats = cast(RepVGG, folded), cast(FloatLayers, layers)
    check_options(like, options)
    g = GraphBuilder()
    x = layers.point(g, "input", add_input(g, like, floats, options), signed=True)
    x = _add_resnet(g, folded, layers, x) if isinstance(folded, ResNet) else _add_vgg(g, folded, layers, x)
    outputs = add_output(g, like, floats, options, x)
    if isinstance(layers, FloatLayers) and layers.rounding.overflowed:
        raise GraphError(f"{next(iter(layers.rounding.overflowed))} does not fit FP16", "measure it in fp32")
    producer = ("repvgg-deploy", repvgg_deploy.__version__)
    return make_graph(g, [describe_input(like, options)], outputs, options.opset, metadata, producer)


def _conv_relu(g: GraphBuilder, name: str, conv: nn.Conv2d, layers: BaselineLayers, x: str) -> str:
    return layers.point(g, f"{name}.relu", g.add("Relu", [layers.conv(g, name, conv, x)], f"{name}.activated"))


def _add_resnet(g: GraphBuilder, net: ResNet, layers: BaselineLayers, x: str) -> str:
    x = _conv_relu(g, "conv1", net.conv1, layers, x)
    x = g.add("MaxPool", [x], "maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for name, block in net.named_blocks():
        x = _add_residual_block(g, name, block, layers, x)
    x = layers.point(g, "pool.input", x)
    x = layers.point(g, "pool.output", g.add("GlobalAveragePool", [x], "pool"))
    x = layers.inner_point(g, "features.output", g.add("Flatten", [x], "features"))
    return layers.linear(g, "fc", net.fc, x)


def _add_residual_block(g: GraphBuilder, name: str, block: ResidualBlock, layers: BaselineLayers, x: str) -> str:
    # Each reader of the block's input has a Q/DQ pair of its own: ONNX Runtime keeps a convolution in float where its
    # input's pair has several readers, which would make the baseline slower than it needs to be.
    y = layers.point(g, f"{name}.main", x)
    x = layers.point(g, f"{name}.skip", x)
    for index in range(1, block.depth):
        y = _conv_relu(g, f"{name}.conv{index}", block.conv(index), layers, y)
    last = f"{name}.conv{block.depth}"
    y = layers.inner_point(g, f"{last}.output", layers.conv(g, last, block.conv(block.depth), y), signed=True)
    if block.downsample is not None:
        conv = cast(nn.Conv2d, block.downsample[0])
        x = layers.point(g, f"{name}.downsample.output", layers.conv(g, f"{name}.downsample", conv, x), signed=True)
    # The sum has two readers, each with a pair of its own, so no pair stands around it and it stays float.
    return g.add("Relu", [g.add("Add", [y, x], f"{name}.sum")], f"{name}.activated")


def _add_vgg(g: GraphBuilder, net: Vgg, layers: BaselineLayers, x: str) -> str:
    for s, stage in enumerate(net.stages):
        for c, conv in enumerate(cast(nn.ModuleList, stage)):
            x = _conv_relu(g, f"stages.{s}.{c}", cast(nn.Conv2d, conv), layers, x)
        x = g.add("MaxPool", [x], f"pool{s}", kernel_shape=[2, 2], strides=[2, 2])
        x = layers.point(g, f"pool{s}.output", x)
    x = layers.inner_point(g, "features.output", g.add("Flatten", [x], "features"))
    *hidden, last = (cast(nn.Linear, linear) for linear in net.classifier)
    for index, linear in enumerate(hidden):
        x = layers.linear(g, f"classifier.{index}", linear, x)
        x = layers.point(g, f"classifier.{index}.relu", g.add("Relu", [x], f"classifier.{index}.activated"))
    return layers.linear(g, f"classifier.{len(hidden)}", last, x)


@dataclass
class _PointNames(BaselineFloats):
    """Float layers that remember which tensor lies on each point."""

    tensors: dict[str, str] = field(default_factory=dict)

    def point(self, g: GraphBuilder, name: str, x: str, signed: bool = False) -> str:  # noqa: ARG002
        self.tensors[name] = x
        return x

    def inner_point(self, g: GraphBuilder, name: str, x: str, signed: bool = False) -> str:
        return self.point(g, name, x, signed)


def find_ranges(net: BaselineNet, images: NDArray[np.float32]) -> dict[str, float]:
    """The largest magnitude on every point of `net` for `images` (N, C, H, W), as int8 layers want them."""
    layers = _PointNames()
    options = GraphOptions(images.shape[2], images.shape[3])
    model = to_baseline_onnx(net, layers, options, {}).to_proto()
    seen = sorted(set(layers.tensors.values()) - {"images"})
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in seen)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    peaks = {"images": float(np.abs(images).max())}
    for name, value in zip(seen, session.run(seen, {"images": images}), strict=True):
        peaks[name] = float(np.abs(value).max())
    return {point: peaks[tensor] for point, tensor in layers.tensors.items()}
