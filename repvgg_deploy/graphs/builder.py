"""An ONNX graph whose weights stay outside the protobuf until it is written: small to simplify, cheap to save.

Protobuf messages may be concatenated field by field. So the file is the serialized graph without weights, followed by
one `initializer` field per weight, written straight from its array: no second copy of the weights is ever in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx.checker
from numpy.typing import NDArray
from onnx import TensorProto, helper

from repvgg_deploy.errors import GraphError

Array = NDArray[Any]
TWO_GIB = 1 << 31
"""No protobuf may be larger; beyond it the weights go to a file of their own."""


@dataclass
class GraphBuilder:
    """Collects nodes and weights; every method returns the name of the tensor that it makes."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node `op` that makes the tensor `output`, after which it is named."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def rename(self, tensor: str, name: str) -> None:
        """Give a tensor that a node makes another name."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, known in enumerate(names):
                    if known == tensor:
                        names[index] = name

    def weight(self, name: str, value: Array) -> str:
        """An initializer."""
        if name in self.weights:
            raise ValueError(f"two initializers are called {name}")
        self.weights[name] = value
        return name


@dataclass(frozen=True)
class OnnxGraph:
    """A graph in two parts: `model`, the protobuf without any initializer, and the `weights` by name."""

    model: onnx.ModelProto
    weights: Mapping[str, Array]

    @property
    def weight_bytes(self) -> int:
        """Size of all weights."""
        return sum(array.nbytes for array in self.weights.values())

    def op_histogram(self) -> dict[str, int]:
        """How many nodes of each operator there are, operators in alphabetical order."""
        ops = [node.op_type for node in self.model.graph.node]
        return {op: ops.count(op) for op in sorted(set(ops))}

    def without_values(self) -> onnx.ModelProto:
        """The graph with its weights declared as inputs: tools that need types and shapes alone see a small one."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.graph.input.extend(_as_inputs(self.weights))
        return model

    def to_proto(self) -> onnx.ModelProto:
        """The whole graph as one protobuf in memory, for graphs below 2 GiB."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for name, array in self.weights.items():
            header = onnx.TensorProto.FromString(_tensor_header(name, array))
            header.raw_data = np.ascontiguousarray(array).tobytes()
            model.graph.initializer.append(header)
        return model


def make_graph(
    builder: GraphBuilder,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    opset: int,
    metadata: Mapping[str, str],
    producer: tuple[str, str],
) -> OnnxGraph:
    """The nodes and weights of `builder` as a graph, fully checked; `SimplificationCheck` says if it can be simpler.

    Raises:
        GraphError: the graph is not valid ONNX.
    """
    graph = helper.make_graph(builder.nodes, "repvgg", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    # The lowest IR version that has the opset is what the most runtimes can read.
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    model.producer_name, model.producer_version = producer
    helper.set_model_props(model, dict(sorted(metadata.items())))
    made = OnnxGraph(model, dict(builder.weights))
    try:
        onnx.checker.check_model(made.without_values(), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the graph is not valid ONNX: {error}", "try another --opset") from error
    return made


def _as_inputs(weights: Mapping[str, Array]) -> list[onnx.ValueInfoProto]:
    """Declarations of the weights, by type and shape."""
    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in weights.items()
    ]


def write_graph(
    graph: OnnxGraph,
    path: Path,
    external_above: int = TWO_GIB - (1 << 20),
) -> None:
    """Write `graph` to `path`; identical graphs give identical bytes.

    Where the weights take more than `external_above` bytes the large ones go to `<path>.data` beside it.
    """
    # By default the last MiB below protobuf's limit is left to nodes and names.
    external = {n for n, a in graph.weights.items() if a.nbytes >= LARGE and graph.weight_bytes > external_above}
    rest = onnx.ModelProto()
    rest.CopyFrom(graph.model)
    rest.ClearField("graph")
    skeleton = graph.model.graph.SerializeToString(deterministic=True)
    headers = _headers(graph, path, external)
    sizes = [
        len(header) + (0 if name in external else array.nbytes)
        for header, (name, array) in zip(headers, graph.weights.items(), strict=True)
    ]
    fields = [encode_field(GRAPH_INITIALIZER, size) for size in sizes]
    total = len(skeleton) + sum(sizes) + sum(map(len, fields))
    with path.open("wb") as file:
        file.write(rest.SerializeToString(deterministic=True))
        file.write(encode_field(MODEL_GRAPH, total))
        file.write(skeleton)
        for prefix, header, (name, array) in zip(fields, headers, graph.weights.items(), strict=True):
            file.write(prefix)
            file.write(header)
            if name not in external:
                _write_array(file, array)
    if external:
        with path.with_name(path.name + ".data").open("wb") as file:
            for name, array in graph.weights.items():
                if name not in external:
                    continue
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                _write_array(file, array)


# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9
# What a runtime can map into memory directly.
_ALIGNMENT = 4096
# Of one write. On ext4 (Linux 6.18, a virtual machine) 443 MB took 0.2 s in pieces of up to 2 MB, and 0.2 s or 1.4 s
# from one time to the next in pieces of 11 MB.
_PIECE = 1 << 20
# In bytes; smaller weights may be shapes or counts, which whoever reads the graph wants to see at once.
LARGE = 1024


def encode_field(number: int, size: int) -> bytes:
    """The tag and length that stand before a length-delimited protobuf field."""
    return bytes([number << 3 | 2]) + _varint(size)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _tensor_header(name: str, array: Array) -> bytes:
    header = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    return bytes(header.SerializeToString(deterministic=True))


def _headers(graph: OnnxGraph, path: Path, external: Container[str]) -> list[bytes]:
    headers, offset = [], 0
    for name, array in graph.weights.items():
        header = _tensor_header(name, array)
        if name in external:
            offset += -offset % _ALIGNMENT
            headers.append(with_external_data(header, path.name + ".data", offset, array.nbytes))
            offset += array.nbytes
        else:
            headers.append(header + encode_field(TENSOR_RAW_DATA, array.nbytes))
    return headers


def with_external_data(header: bytes, file_name: str, offset: int, size: int) -> bytes:
    """A serialized tensor without values, as one whose values lie in a file beside the graph's."""
    tensor = TensorProto.FromString(header)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file_name), ("offset", offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))
    return bytes(tensor.SerializeToString(deterministic=True))


def _write_array(file: BinaryIO, array: Array) -> None:
    # As ONNX has `raw_data`, whatever the machine's own byte order.
    little = np.ascontiguousarray(array)
    if little.dtype.byteorder == ">" or struct.pack("=H", 1) != struct.pack("<H", 1):
        little = little.byteswap()
    content = memoryview(little.reshape(-1).view(np.uint8).data) if little.size else memoryview(b"")
    for start in range(0, len(content), _PIECE):
        file.write(content[start : start + _PIECE])
