"""Quantized chains in their ONNX graph: Q/DQ pairs where TensorRT and ONNX Runtime fuse them into the convolutions.

A pair stands after every ReLU of a chain, the last one's too: ONNX Runtime runs a convolution in integers only if all
that reads it is a QuantizeLinear. What else reads a chain's output reads what the pair gives. In front of a chain whose
input is float, a pair stands for the chain alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.torch_export import check
from repvgg_deploy.quantization.chains import GraphReaders, QuantizedChain
from repvgg_deploy.quantization.pair_sums import INT16_MAX, largest_pair_sum
from repvgg_deploy.quantization.state import LayerIntegers

# Where every input is at least 0, so is the output.
_KEEP_SIGN = {
    "Add", "AveragePool", "Concat", "Expand", "Flatten", "Gather", "GlobalAveragePool",
    "GlobalMaxPool", "Identity", "MaxPool", "Mul", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


def input_scale(tensor: str, done: Sequence[QuantizedChain]) -> float | None:
    """The scale that a tensor has been given by the chains before, as one's output or as another's input."""
    for quantized in done:
        if quantized.chain.y == tensor and quantized.output_scale is not None:
            return quantized.output_scale
        if quantized.chain.x == tensor:
            return quantized.layers[0].input_scale
    return None


def is_nonnegative(tensor: str, links: GraphReaders, depth: int = 20) -> bool:
    """Whether a tensor can be told from the graph to hold nothing negative."""
    maker = links.makers.get(tensor)
    # Unknown counts as signed, which is safe: up to 127 int8 has the integers of uint8.
    if maker is None or depth == 0:
        return False
    if maker.op_type in ("Relu", "Sigmoid", "Softmax", "HardSigmoid"):
        return True
    if maker.op_type == "Resize":
        mode = next((helper.get_attribute_value(item) for item in maker.attribute if item.name == "mode"), b"nearest")
        # Cubic weights are negative in part.
        return mode != b"cubic" and is_nonnegative(maker.input[0], links, depth - 1)
    if maker.op_type not in _KEEP_SIGN:
        return False
    data = list(maker.input) if maker.op_type in ("Concat", "Add", "Mul") else [maker.input[0]]
    return all(is_nonnegative(name, links, depth - 1) for name in data)


@dataclass
class _Insertion:
    """A graph being rewritten: the constants that are added, and the nodes in their order."""

    links: GraphReaders
    constants: list[onnx.TensorProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def constant(self, name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def pair(self, x: str, y: str, name: str, scale: float, unsigned: bool) -> None:
        """QuantizeLinear and DequantizeLinear from tensor `x` to tensor `y`."""
        scale_name = self.constant(f"{name}.scale", np.asarray(scale, np.float32))
        zero = self.constant(f"{name}.zero_point", np.zeros((), np.uint8 if unsigned else np.int8))
        middle = f"{name}.quantized"
        self.nodes.append(helper.make_node("QuantizeLinear", [x, scale_name, zero], [middle], middle))
        self.nodes.append(helper.make_node("DequantizeLinear", [middle, scale_name, zero], [y], f"{name}.dequantized"))

    def weight(self, name: str, layer: LayerIntegers) -> str:
        largest = largest_pair_sum(layer.weight)
        if largest > INT16_MAX:
            raise GraphError(f"two products of {name} may add up to {largest}, which does not fit 16 bits")
        integers = self.constant(f"{name}.weight_int8", layer.weight.numpy())
        scales = self.constant(f"{name}.weight_scale", layer.weight_scale.numpy())
        zero = self.constant(f"{name}.weight_zero_point", np.zeros(len(layer.weight), np.int8))
        y = f"{name}.weight_dequantized"
        self.nodes.append(helper.make_node("DequantizeLinear", [integers, scales, zero], [y], y, axis=0))
        return y


def insert_chains(model: onnx.ModelProto, done: Sequence[QuantizedChain]) -> onnx.ModelProto:
    """A copy of `model` in which the layers of these chains are int8, checked; the rest is as it was."""
    layers = {conv.name: (conv, layer) for q in done for conv, layer in zip(q.chain.convs, q.layers, strict=True)}
    output_scales = _output_scales(done)
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    work = _Insertion(GraphReaders(model.graph))
    paired: set[str] = set()
    for node in rewritten.graph.node:
        if node.name in layers:
            conv, layer = layers[node.name]
            if conv.x not in output_scales and conv.x not in paired:
                unsigned = is_nonnegative(conv.x, work.links)
                work.pair(conv.x, f"{conv.x}.rounded", conv.x, layer.input_scale, unsigned)
                paired.add(conv.x)
            node.input[0] = conv.x if conv.x in output_scales else f"{conv.x}.rounded"
            node.input[1] = work.weight(node.name, layer)
            # An integer convolution holds its bias in units of its sums; a float one then computes the same.
            unit = layer.weight_scale * layer.input_scale
            bias = work.constant(f"{node.name}.bias_corrected", ((layer.bias / unit).round() * unit).numpy())
            node.input[2:] = [bias]
        work.nodes.append(node)
        made = next((name for name in node.output if name in output_scales), None)
        if made is not None:
            node.output[0] = f"{made}.exact"
            # The pair's output takes the tensor's old name, so that whatever reads it needs no change.
            work.pair(f"{made}.exact", made, made, output_scales[made], unsigned=True)
    _replace_nodes(rewritten.graph, work)
    check(rewritten)
    return rewritten


def _output_scales(done: Sequence[QuantizedChain]) -> dict[str, float]:
    """The scale of every tensor that a quantized layer makes, by name, where it is quantized."""
    scales: dict[str, float] = {}
    for quantized in done:
        for conv, following in zip(quantized.chain.convs[:-1], quantized.layers[1:], strict=True):
            scales[conv.y] = following.input_scale
        if quantized.output_scale is not None:
            scales[quantized.chain.y] = quantized.output_scale
    return scales


def _replace_nodes(graph: onnx.GraphProto, work: _Insertion) -> None:
    # Copies: these messages are parts of the graph that is emptied next.
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in work.nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [item for item in graph.initializer if item.name in read]
    kept = [onnx.TensorProto.FromString(item.SerializeToString()) for item in kept]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *work.constants])


def prune(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """The part of `model` that makes `tensor`, which becomes its only output."""
    links = GraphReaders(model.graph)
    needed, waiting = set[str](), [tensor]
    while waiting:
        node = links.makers.get(waiting.pop())
        if node is not None and node.name not in needed:
            needed.add(node.name)
            waiting += node.input
    part = onnx.ModelProto()
    part.CopyFrom(model)
    nodes = [node for node in model.graph.node if node.name in needed]
    read = {name for node in nodes for name in node.input} | {tensor}
    del part.graph.node[:], part.graph.initializer[:], part.graph.output[:]
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(item for item in model.graph.initializer if item.name in read)
    part.graph.output.append(helper.make_empty_tensor_value_info(tensor))
    return part
