"""The fused net as an ONNX graph: Conv, Relu, GlobalAveragePool, Flatten, Gemm, and nothing that is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

import repvgg_deploy
from repvgg_deploy.artifacts import Precision, Preprocessing, Provenance
from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import Array, GraphBuilder, OnnxGraph, make_graph
from repvgg_deploy.images.decoding import scale_and_shift
from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, SqueezeExciteBlock

DEFAULT_OPSET = 19
LOWEST_OPSET = 13
METADATA_PREFIX = "repvgg_deploy."

# IEEE 754 half precision: the largest number, the smallest normal one, and what is rounded to zero below.
FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
FP16_ROUNDS_TO_ZERO = 2.0**-25


@dataclass(frozen=True)
class GraphOptions:
    """What the graph takes and gives.

    Attributes:
        height, width: of the input, in pixels.
        batch: a fixed batch, or None for a dynamic one.
        opset: of the default ONNX domain.
        io: type of the input and output tensors, fp32 or fp16.
        uint8_input: the normalization if the graph takes uint8 NHWC pixels 0-255 and normalizes them itself.
        softmax: the output is `probabilities` in place of `logits`.
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


@dataclass
class Fp16Rounding:
    """What rounding to FP16 did to the weights: numbers of values."""

    values: int = 0
    subnormal: int = 0
    flushed_to_zero: int = 0
    overflowed: dict[str, float] = field(default_factory=dict)

    def round(self, name: str, array: Array) -> Array:
        """`array` in float16; what was lost is counted."""
        size = np.abs(array)
        self.values += array.size
        self.subnormal += int(((size < FP16_SMALLEST_NORMAL) & (size > FP16_ROUNDS_TO_ZERO)).sum())
        self.flushed_to_zero += int(((size <= FP16_ROUNDS_TO_ZERO) & (size > 0)).sum())
        largest = float(size.max(initial=0.0))
        # 65520 is the first value that rounds to infinity.
        if largest >= 65520.0:
            self.overflowed[name] = largest
            return np.zeros(array.shape, np.float16)
        return array.astype(np.float16)


class Layers(Protocol):
    """How the layers of the net become nodes; `x` and the returned string are names of tensors."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the tensors between the layers."""

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        """A convolution and its bias."""

    def relu(self, g: GraphBuilder, name: str, x: str) -> str:
        """The ReLU at the end of the block `name`."""

    def pool(self, g: GraphBuilder, name: str, x: str) -> str:
        """The mean over height and width, in front of the classifier."""

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        """The classifier."""


@dataclass
class FloatLayers:
    """Layers in float32 or float16."""

    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    rounding: Fp16Rounding = field(default_factory=Fp16Rounding)

    def value(self, g: GraphBuilder, name: str, tensor: Tensor) -> str:
        """A weight in the layers' type."""
        array = tensor.detach().numpy()
        return g.weight(
            name, self.rounding.round(name, array) if self.dtype == np.float16 else array.astype(self.dtype, copy=False)
        )

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        """A Conv node."""
        weight = self.value(g, f"{name}.weight", conv.weight)
        bias = self.value(g, f"{name}.bias", cast(Tensor, conv.bias))
        return add_conv(g, name, conv, [x, weight, bias])

    def relu(self, g: GraphBuilder, name: str, x: str) -> str:
        """A Relu node."""
        return g.add("Relu", [x], f"{name}.relu")

    def pool(self, g: GraphBuilder, name: str, x: str) -> str:
        """A GlobalAveragePool node."""
        return g.add("GlobalAveragePool", [x], name)

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        """A Gemm node."""
        weight = self.value(g, f"{name}.weight", linear.weight)
        bias = self.value(g, f"{name}.bias", linear.bias)
        return g.add("Gemm", [x, weight, bias], name, transB=1)


def add_conv(g: GraphBuilder, name: str, conv: nn.Conv2d, inputs: list[str]) -> str:
    """A Conv node with the geometry of `conv` on `inputs` (x, weight, bias)."""
    pads = [int(p) for p in conv.padding]
    return g.add(
        "Conv",
        inputs,
        name,
        kernel_shape=list(conv.kernel_size),
        strides=list(conv.stride),
        pads=pads * 2,
        group=conv.groups,
    )


def to_onnx(net: RepVGG, layers: Layers, options: GraphOptions, metadata: Mapping[str, str]) -> OnnxGraph:
    """The simplified, checked ONNX graph of a fused net.

    Input `images` (N, C, H, W), or uint8 (N, H, W, C); output `logits` (N, classes), `probabilities`, or `scores` and
    `classes` (N, K). The weights are not copied where their type does not change.

    Raises:
        GraphError: an option does not fit the net or the opset; in FP16, a weight is out of range.
    """
    check_options(net, options)
    g = GraphBuilder()
    x = add_input(g, net, layers, options)
    for name, block in net.named_blocks():
        x = _add_block(g, name, cast(FusedBlock, block), layers, x)
    x = g.add("Flatten", [layers.pool(g, "pool", x)], "features")
    x = layers.linear(g, "classifier", net.classifier, x)
    outputs = add_output(g, net, layers, options, x)
    if isinstance(layers, FloatLayers) and layers.rounding.overflowed:
        name, largest = next(iter(layers.rounding.overflowed.items()))
        raise GraphError(
            f"{len(layers.rounding.overflowed)} weights do not fit FP16 (largest 65504): {name} reaches {largest:.3g}",
            "export with fp32, or --int8, where every channel has a scale of its own",
        )
    producer = ("repvgg-deploy", repvgg_deploy.__version__)
    return make_graph(g, [describe_input(net, options)], outputs, options.opset, metadata, producer)


def check_options(net: RepVGG, options: GraphOptions) -> None:
    """Nothing, where `options` fit the net and the opset is one that this tool writes.

    Raises:
        GraphError: they do not.
    """
    newest = onnx.defs.onnx_opset_version()
    if not LOWEST_OPSET <= options.opset <= newest:
        raise GraphError(f"opset {options.opset} is not supported", f"from {LOWEST_OPSET} to {newest}")
    if options.topk is not None and not 1 <= options.topk <= net.spec.classes:
        raise GraphError(f"--topk {options.topk} of {net.spec.classes} classes", f"from 1 to {net.spec.classes}")
    if min(options.height, options.width) < 1:
        raise GraphError(f"an image of {options.height}x{options.width} pixels", "sizes are at least 1")
    if options.uint8_input is not None and len(options.uint8_input.mean) != net.spec.in_channels:
        raise GraphError(
            f"--uint8-input: mean and std have {len(options.uint8_input.mean)} values,"
            f" the net takes {net.spec.in_channels} channels",
            "give --mean and --std, one value a channel",
        )


def _io_dtype(options: GraphOptions) -> np.dtype[Any]:
    return np.dtype(np.float16 if options.io is Precision.FP16 else np.float32)


def _type(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))


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


def _add_block(g: GraphBuilder, name: str, block: FusedBlock, layers: Layers, x: str) -> str:
    x = layers.conv(g, f"{name}.conv", block.conv, x)
    x = _add_squeeze_excite(g, f"{name}.se_before", block.se_before, layers, x)
    x = layers.relu(g, name, x)
    return _add_squeeze_excite(g, f"{name}.se_after", block.se_after, layers, x)


def _add_squeeze_excite(g: GraphBuilder, name: str, se: nn.Module, layers: Layers, x: str) -> str:
    if not isinstance(se, SqueezeExciteBlock):
        return x
    floats = layers if isinstance(layers, FloatLayers) else FloatLayers(layers.dtype)
    s = g.add("GlobalAveragePool", [x], f"{name}.squeeze")
    s = g.add("Relu", [floats.conv(g, f"{name}.down", se.down, s)], f"{name}.relu")
    s = g.add("Sigmoid", [floats.conv(g, f"{name}.up", se.up, s)], f"{name}.gate")
    return g.add("Mul", [x, s], f"{name}.scaled")


def add_output(
    g: GraphBuilder, net: RepVGG, layers: Layers, options: GraphOptions, x: str
) -> list[onnx.ValueInfoProto]:
    """The nodes behind the classifier and the declared outputs; what is computed here is computed in the I/O type."""
    dtype = _io_dtype(options)
    batch: int | str = options.batch or "batch"
    steps: list[tuple[str, dict[str, Any]]] = []
    if dtype != layers.dtype:
        steps.append(("Cast", {"to": _type(dtype)}))
    if options.softmax:
        steps.append(("Softmax", {"axis": -1}))
    final = "probabilities" if options.softmax else "logits"
    inner = f"{final}_all" if options.topk else final
    for number, (op, attributes) in enumerate(steps):
        x = g.add(op, [x], inner if number == len(steps) - 1 else f"{x}_{op.lower()}", **attributes)
    if not steps:
        # The classifier's own node makes the output.
        g.nodes[-1].output[0] = x = inner
    if options.topk is None:
        return [helper.make_tensor_value_info(final, _type(dtype), [batch, net.spec.classes])]
    k = g.weight("topk.k", np.array([options.topk], np.int64))
    g.nodes.append(helper.make_node("TopK", [x, k], ["scores", "classes"], name="topk", axis=-1))
    return [
        helper.make_tensor_value_info("scores", _type(dtype), [batch, options.topk]),
        helper.make_tensor_value_info("classes", TensorProto.INT64, [batch, options.topk]),
    ]


def make_metadata(provenance: Provenance) -> dict[str, str]:
    """The provenance as the `metadata_props` of a graph: every key begins with `repvgg_deploy.`."""
    values: dict[str, str] = {
        "version": repvgg_deploy.__version__,
        "sha256": provenance.sha256,
        "arch": provenance.arch,
        "layout": provenance.layout,
        "form": provenance.form,
        "precision": str(provenance.precision),
        "tools": json.dumps(provenance.tools, sort_keys=True),
    }
    if provenance.preprocessing is not None:
        values["preprocessing"] = provenance.preprocessing.to_json()
    if provenance.class_names is not None:
        values["class_names"] = json.dumps(list(provenance.class_names), ensure_ascii=False)
    values |= {key: json.dumps(value, sort_keys=True) for key, value in provenance.extra.items()}
    return {METADATA_PREFIX + key: value for key, value in values.items()}


def read_metadata(properties: Mapping[str, str]) -> Provenance | None:
    """The inverse of `make_metadata`; None for a graph that this tool did not make.

    Raises:
        GraphError: the metadata are this tool's, and damaged.
    """
    values = {k.removeprefix(METADATA_PREFIX): v for k, v in properties.items() if k.startswith(METADATA_PREFIX)}
    known = {"version", "sha256", "arch", "layout", "form", "precision", "tools", "preprocessing", "class_names"}
    if not {"sha256", "arch", "precision"} <= values.keys():
        return None
    try:
        return Provenance(
            sha256=values["sha256"],
            arch=values["arch"],
            layout=values.get("layout", ""),
            form=values.get("form", ""),
            precision=Precision(values["precision"]),
            preprocessing=Preprocessing.from_json(values["preprocessing"]) if "preprocessing" in values else None,
            class_names=tuple(json.loads(values["class_names"])) if "class_names" in values else None,
            tools=json.loads(values.get("tools", "{}")),
            extra={key: json.loads(value) for key, value in values.items() if key not in known},
        )
    except (ValueError, TypeError, KeyError) as error:
        raise GraphError(f"the graph's metadata are damaged ({error})", "export it again") from error
