"""The fused net as an ONNX graph: Conv, Relu, GlobalAveragePool, Flatten, Gemm, and nothing that is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import nn

import repvgg_deploy
from repvgg_deploy.artifacts import Precision, Preprocessing
from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import GraphBuilder, OnnxGraph, make_graph
from repvgg_deploy.graphs.layers import FloatLayers, Layers
from repvgg_deploy.images.decoding import scale_and_shift
from repvgg_deploy.nets.activations import Activation
from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, SqueezeExciteBlock

# The first opset whose QuantizeLinear takes float16 scales.
DEFAULT_OPSET = 19
# The first opset whose QuantizeLinear and DequantizeLinear have an `axis`, which one scale per filter needs.
LOWEST_OPSET = 13


@dataclass(frozen=True)
class GraphOptions:
    """What the graph takes and gives.

    Attributes:
        height, width: of the input, in pixels.
        batch: a fixed batch, or None for a dynamic one.
        opset: of the default ONNX domain.
        io: type of the input and output tensors, fp32 or fp16.
        uint8_input: the normalization if the graph takes uint8 NHWC pixels 0-255 and normalizes them itself.
        softmax: the output is `probabilities` instead of `logits`.
        topk: the outputs are the K largest `scores` and their `classes`.
    """

    height: int
    width: int
    batch: int | None = None
    opset: int = DEFAULT_OPSET
    io: Precision = Precision.FP32
    uint8_input: Preprocessing | None = None
    softmax: bool = False
    topk: int | None = None


def to_onnx(net: RepVGG, layers: Layers, options: GraphOptions, metadata: Mapping[str, str]) -> OnnxGraph:
    """The simplified, checked ONNX graph of a fused net.

    Input `images` (N, C, H, W), or uint8 (N, H, W, C); output `logits` (N, classes), `probabilities`, or `scores` and
    `classes` (N, K); of a backbone `features` (N, C), or maps (N, C, H, W) as `stage3`. The weights are not copied
    where their type does not change.

    Raises:
        GraphError: an option does not fit the net or the opset; in FP16, a weight is out of range.
    """
    check_options(net, options)
    g = GraphBuilder()
    x = add_input(g, net, layers, options)
    x, maps = _add_blocks(g, net, layers, x)
    if net.spec.maps:
        outputs = _add_maps(g, net, layers, options, maps)
    else:
        # Of a backbone `features` is the output, which a Cast may still stand before.
        x = g.add("Flatten", [layers.pool(g, "pool", x)], "features" if net.has_classifier else "pooled")
        x = add_hidden(g, net, layers, x)
        if net.has_classifier:
            x = layers.linear(g, "classifier", net.classifier, x)
        outputs = add_output(g, net, layers, options, x)
    if isinstance(layers, FloatLayers) and layers.rounding.overflowed:
        name, largest = next(iter(layers.rounding.overflowed.items()))
        raise GraphError(
            f"{len(layers.rounding.overflowed)} weights do not fit FP16 (largest 65504): {name} reaches {largest:.3g}",
            "export with fp32, or --int8, which has one scale per channel",
        )
    producer = ("repvgg-deploy", repvgg_deploy.__version__)
    return make_graph(g, [describe_input(net, options)], outputs, options.opset, metadata, producer)


def check_options(net: RepVGG, options: GraphOptions) -> None:
    """Raise GraphError unless `options` fit the net and the opset is supported.

    Raises:
        GraphError: an option does not fit.
    """
    newest = onnx.defs.onnx_opset_version()
    if not LOWEST_OPSET <= options.opset <= newest:
        raise GraphError(f"opset {options.opset} is not supported", f"from {LOWEST_OPSET} to {newest}")
    _check_scores(net, options)
    if options.topk is not None and not 1 <= options.topk <= net.spec.classes:
        raise GraphError(
            f"--topk {options.topk} is out of range: the net has {net.spec.classes} classes",
            f"from 1 to {net.spec.classes}",
        )
    if min(options.height, options.width) < 1:
        raise GraphError(f"the image size cannot be {options.height}x{options.width} pixels", "sizes are at least 1")
    if options.uint8_input is not None and len(options.uint8_input.mean) != net.spec.in_channels:
        raise GraphError(
            f"--uint8-input: mean and std have {len(options.uint8_input.mean)} values,"
            f" the net takes {net.spec.in_channels} channels",
            "give --mean and --std, one value per channel",
        )


def _check_scores(net: RepVGG, options: GraphOptions) -> None:
    if not net.spec.classes and (options.softmax or options.topk is not None):
        raise GraphError("--softmax and --topk are for classes, and features have none", "leave them out")
    if options.softmax and net.spec.classes == 1:
        raise GraphError(
            "--softmax of one logit is 1 whatever the image",
            "leave --softmax out; the sigmoid of a single logit is its probability",
        )


def _io_dtype(options: GraphOptions) -> np.dtype[Any]:
    return np.dtype(np.float16 if options.io is Precision.FP16 else np.float32)


def _type(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))


def add_hidden(g: GraphBuilder, net: RepVGG, layers: Layers, x: str) -> str:
    """The nodes of the hidden layers of the head, which are never quantized."""
    floats = layers if isinstance(layers, FloatLayers) else FloatLayers(layers.dtype)
    for number, linear in enumerate(net.hidden):
        x = floats.linear(g, f"hidden.{number}", cast(nn.Linear, linear), x)
        x = g.add("Relu", [x], f"hidden.{number}.relu")
    return x


def describe_input(net: RepVGG, options: GraphOptions) -> onnx.ValueInfoProto:
    """The declaration of the input `images`."""
    batch: int | str = options.batch or "batch"
    if options.uint8_input is not None:
        shape = [batch, options.height, options.width, net.spec.in_channels]
        return helper.make_tensor_value_info("images", TensorProto.UINT8, shape)
    shape = [batch, net.spec.in_channels, options.height, options.width]
    return helper.make_tensor_value_info("images", _type(_io_dtype(options)), shape)


def add_input(g: GraphBuilder, net: RepVGG, layers: Layers, options: GraphOptions) -> str:
    """The nodes between the input and the first layer: casts, and for pixels the normalization."""
    if options.uint8_input is None:
        same = _io_dtype(options) == layers.dtype
        return "images" if same else g.add("Cast", ["images"], "images_cast", to=_type(layers.dtype))
    # Normalized before the convolution's zero padding, not folded into its kernel: so the borders stay exact. In
    # float32 also where the layers are FP16, which would add a rounding to every pixel.
    scale, shift = (v.reshape(net.spec.in_channels, 1, 1) for v in scale_and_shift(options.uint8_input))
    x = g.add("Cast", ["images"], "pixels", to=TensorProto.FLOAT)
    x = g.add("Transpose", [x], "pixels_nchw", perm=[0, 3, 1, 2])
    x = g.add("Mul", [x, g.weight("normalize.scale", scale)], "pixels_scaled")
    x = g.add("Add", [x, g.weight("normalize.shift", shift)], "pixels_normalized")
    return x if layers.dtype == np.float32 else g.add("Cast", [x], "pixels_cast", to=_type(layers.dtype))


def _add_blocks(g: GraphBuilder, net: RepVGG, layers: Layers, x: str) -> tuple[str, dict[str, str]]:
    """The nodes of all blocks: the last one's output, and where each map that the net gives is read from."""
    maps: dict[str, str] = {}
    blocks = list(net.named_blocks())
    readers = [*(name for name, _ in blocks[1:]), None]
    for (name, block), reader in zip(blocks, readers, strict=True):
        x = _add_block(g, name, cast(FusedBlock, block), net.spec.activation, layers, x)
        if name in net.map_names:
            maps[net.map_names[name]] = layers.read_map(g, reader, x)
    return x, maps


def _add_maps(
    g: GraphBuilder, net: RepVGG, layers: Layers, options: GraphOptions, maps: Mapping[str, str]
) -> list[onnx.ValueInfoProto]:
    """The outputs that are maps, as they are where the types allow it."""
    outputs, dtype = [], _io_dtype(options)
    height, width = options.height, options.width
    for number, stage in enumerate(net.spec.stages):
        for block in stage:
            height, width = (-(-size // block.stride) for size in (height, width))
        name = f"stage{number}"
        if name not in maps:
            continue
        if dtype == layers.dtype:
            g.rename(maps[name], name)
        else:
            g.add("Cast", [maps[name]], name, to=_type(dtype))
        shape = [options.batch or "batch", stage[-1].out_channels, height, width]
        outputs.append(helper.make_tensor_value_info(name, _type(dtype), shape))
    return outputs


def _add_block(g: GraphBuilder, name: str, block: FusedBlock, activation: Activation, layers: Layers, x: str) -> str:
    x = layers.conv(g, f"{name}.conv", block.conv, x)
    x = _add_squeeze_excite(g, f"{name}.se_before", block.se_before, layers, x)
    x = layers.activate(g, name, activation, x)
    return _add_squeeze_excite(g, f"{name}.se_after", block.se_after, layers, x)


def _add_squeeze_excite(g: GraphBuilder, name: str, se: nn.Module, layers: Layers, x: str) -> str:
    if not isinstance(se, SqueezeExciteBlock):
        return x
    floats = layers if isinstance(layers, FloatLayers) else FloatLayers(layers.dtype)
    # In float in INT8 graphs as well: at 224 px it is 0.03 % of the multiply-adds at most (RepVGGplus-L2pse).
    s = g.add("GlobalAveragePool", [x], f"{name}.squeeze")
    s = g.add("Relu", [floats.conv(g, f"{name}.down", se.down, s)], f"{name}.relu")
    s = g.add("Sigmoid", [floats.conv(g, f"{name}.up", se.up, s)], f"{name}.gate")
    return g.add("Mul", [x, s], f"{name}.scaled")


def add_output(
    g: GraphBuilder, net: RepVGG, layers: Layers, options: GraphOptions, x: str
) -> list[onnx.ValueInfoProto]:
    """The nodes after the last layer and the declared outputs; what is computed here is computed in the I/O type."""
    dtype = _io_dtype(options)
    batch: int | str = options.batch or "batch"
    steps: list[tuple[str, dict[str, Any]]] = []
    if dtype != layers.dtype:
        steps.append(("Cast", {"to": _type(dtype)}))
    if options.softmax:
        steps.append(("Softmax", {"axis": -1}))
    final = "probabilities" if options.softmax else "logits" if net.spec.classes else "features"
    inner = f"{final}_all" if options.topk else final
    for number, (op, attributes) in enumerate(steps):
        x = g.add(op, [x], inner if number == len(steps) - 1 else f"{x}_{op.lower()}", **attributes)
    if not steps:
        # The last layer's own node makes the output.
        g.nodes[-1].output[0] = x = inner
    if options.topk is None:
        return [helper.make_tensor_value_info(final, _type(dtype), [batch, net.spec.classes or net.spec.features])]
    k = g.weight("topk.k", np.array([options.topk], np.int64))
    g.nodes.append(helper.make_node("TopK", [x, k], ["scores", "classes"], name="topk", axis=-1))
    return [
        helper.make_tensor_value_info("scores", _type(dtype), [batch, options.topk]),
        helper.make_tensor_value_info("classes", TensorProto.INT64, [batch, options.topk]),
    ]
