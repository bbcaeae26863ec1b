"""ONNX graphs changed through ONNX's own classes, given to `inspect`, `verify`, `eval`, `bench` and `package`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cache
from random import Random
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from PIL import Image

from fuzzing.cases import Case, Format
from fuzzing.checkpoints import make_tensors
from fuzzing.mutations import NAMES, choose_integer, choose_value, dumps, mutate_bytes

_INVALID = "NOT_UTF8"
"""Becomes bytes that are not UTF-8 once the graph is written."""
_PREFIX = "repvgg_deploy."


@cache
def whole_graph() -> bytes:
    """A small classifier with an input of any batch; as this program writes them, with its metadata."""
    tensors = make_tensors()
    weights = {"stem.weight": tensors["stage0.rbr_dense.conv.weight"], "stem.bias": tensors["stage0.rbr_1x1.bn.bias"]}
    weights |= {"classifier.weight": tensors["linear.weight"][:, :4], "classifier.bias": tensors["linear.bias"]}
    nodes = [
        helper.make_node("Conv", ["images", "stem.weight", "stem.bias"], ["a"], kernel_shape=[3, 3], strides=[2, 2],
                         pads=[1, 1, 1, 1], group=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"], axis=1),
        helper.make_node("Gemm", ["d", "classifier.weight", "classifier.bias"], ["logits"], transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    preprocessing = (
        '{"height": 32, "width": 32, "resize": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], '
        '"interpolation": "bilinear", "color_order": "rgb"}'
    )
    values = {"version": "1", "sha256": "0" * 64, "arch": "custom RepVGG", "layout": "official", "form": "train",
              "precision": "fp32", "tools": "{}", "preprocessing": preprocessing,
              "class_names": '["a","b","c","d","e"]',
              "assumed": '["strides"]'}  # fmt: skip
    helper.set_model_props(model, {_PREFIX + key: value for key, value in values.items()})
    return bytes(model.SerializeToString())


def mutate_graph(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A graph with one to three mutations, and their names."""
    model = onnx.ModelProto.FromString(content)
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(_MUTATIONS))
        names.append(name)
        try:
            _MUTATIONS[name](model, rng)
        except (ValueError, TypeError, LookupError, UnicodeError, OverflowError):
            # Protobuf and NumPy themselves refuse some values: too large a number, text that has no UTF-8.
            names[-1] += " (refused)"
    written = model.SerializeToString()
    return written.replace(_INVALID.encode(), b"\xff\xfeT_UTF8"), " + ".join(names)


def _name(rng: Random) -> str:
    return rng.choice((_INVALID, *NAMES))


def _dims(model: Any, rng: Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    place = rng.randrange(len(tensor.dims))
    tensor.dims[place] = choose_integer(rng, tensor.dims[place])


def _more_dims(model: Any, rng: Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    tensor.dims.extend([rng.choice((0, 1, -1, 2**31))] * rng.choice((1, 3, 200)))


def _type(model: Any, rng: Random) -> None:
    rng.choice(model.graph.initializer).data_type = rng.choice((*range(25), 77, 2**31 - 1))


def _raw(model: Any, rng: Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    tensor.raw_data = mutate_bytes(tensor.raw_data, rng)[0]


def _values(model: Any, rng: Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    value = rng.choice((np.nan, np.inf, 1e38, 0.0, -1e-42))
    array = numpy_helper.to_array(tensor).copy()
    array.flat[: rng.choice((1, array.size))] = value
    tensor.raw_data = array.tobytes()


def _rename(model: Any, rng: Random) -> None:
    item = rng.choice((*model.graph.initializer, *model.graph.node, *model.graph.input, *model.graph.output))
    item.name = _name(rng)


def _rename_edge(model: Any, rng: Random) -> None:
    """An edge under another name at all of its ends: the graph is the same."""
    old, new = rng.choice(("images", "logits", "a", "stem.weight")), _name(rng)
    for node in model.graph.node:
        for edges in (node.input, node.output):
            for place, name in enumerate(edges):
                if name == old:
                    edges[place] = new
    for item in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        if item.name == old:
            item.name = new


def _external(model: Any, rng: Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    places = (
        "net.onnx",
        "weights.bin",
        "/etc/passwd",
        "../report.json",
        "../../..",
        "/dev/zero",
        "",
        _INVALID,
        "missing",
    )
    values = {"location": rng.choice((*places, *NAMES)), "offset": str(choose_integer(rng)), "length": str(size)}
    for key in rng.sample(sorted(values), rng.choice((1, 2, 3))):
        values[key] = values[key] if key == "location" else rng.choice((str(choose_integer(rng)), "x", "", "1" * 400))
    for key, value in values.items():
        tensor.external_data.add(key=key, value=value)


def _missing(model: Any, rng: Random) -> None:
    del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def _edge(model: Any, rng: Random) -> None:
    """Cycles, inputs that nothing makes, doubled outputs."""
    node = rng.choice(model.graph.node)
    edges = rng.choice((node.input, node.output))
    if rng.random() < 0.3 or not edges:
        edges.append(rng.choice(("logits", "a", "", _name(rng))))
    else:
        edges[rng.randrange(len(edges))] = rng.choice(("images", "logits", "a", "b", "c", "d", "", "nowhere"))


def _node(model: Any, rng: Random) -> None:
    nodes = model.graph.node
    kind = rng.choice(("drop", "double", "swap", "all", "many"))
    place = rng.randrange(len(nodes))
    if kind == "drop":
        del nodes[place]
    elif kind == "double":
        nodes.append(nodes[place])
    elif kind == "swap":
        other = rng.randrange(len(nodes))
        first, second = onnx.NodeProto(), onnx.NodeProto()
        first.CopyFrom(nodes[place])
        second.CopyFrom(nodes[other])
        nodes[place].CopyFrom(second)
        nodes[other].CopyFrom(first)
    elif kind == "all":
        del nodes[:]
    else:
        for number in range(2_000):
            nodes.append(helper.make_node("Relu", [f"m{number}" if number else "b"], [f"m{number + 1}"]))


def _operator(model: Any, rng: Random) -> None:
    node = rng.choice(model.graph.node)
    operators = ("If", "Loop", "Identity", "Softmax", "QuantizeLinear", "ConvInteger", "Resize", "Unknown", "Constant",
                 "RandomNormal", "NonZero", "Reshape", "MatMul", "StringNormalizer", _INVALID)  # fmt: skip
    node.op_type = rng.choice((*operators, _name(rng)))
    if rng.random() < 0.2:
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "nowhere", _name(rng)))


def _attribute(model: Any, rng: Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    attribute = rng.choice(rng.choice(nodes).attribute)
    kind = rng.choice(("value", "value", "type", "name", "drop"))
    if kind == "value" and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = choose_integer(rng, attribute.ints[0])
    elif kind == "value":
        attribute.i = choose_integer(rng, attribute.i)
    elif kind == "type":
        attribute.type = rng.choice(range(15))
    elif kind == "name":
        attribute.name = _name(rng)
    else:
        attribute.ClearField("ints")


def _nested(model: Any, rng: Random) -> None:
    """Graphs in attributes of graphs."""
    inner = onnx.GraphProto()
    for _ in range(rng.choice((1, 20, 28))):
        node = helper.make_node("If", ["x"], ["y"], then_branch=inner)
        inner = onnx.GraphProto(node=[node])
    model.graph.node.append(helper.make_node("If", ["a"], ["z"], then_branch=inner))


def _input(model: Any, rng: Random) -> None:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    kind = rng.choice(("channels", "batch", "size", "rank", "type", "none", "second", "symbolic", "no type"))
    if kind in ("channels", "batch", "size"):
        place = {"channels": 1, "batch": 0, "size": 2}[kind]
        dims[place].dim_value = rng.choice((1, 4, 0, 3, 64, 10**6, -1, choose_integer(rng)))
    elif kind == "rank":
        del dims[rng.randrange(4) :]
    elif kind == "type":
        model.graph.input[0].type.tensor_type.elem_type = rng.choice(range(25))
    elif kind == "none":
        del model.graph.input[:]
    elif kind == "second":
        model.graph.input.append(helper.make_tensor_value_info("more", 1, [1]))
    elif kind == "symbolic":
        for place in (2, 3):
            dims[place].dim_param = rng.choice(("H", _name(rng)))
    else:
        model.graph.input[0].ClearField("type")


def _output(model: Any, rng: Random) -> None:
    dims = model.graph.output[0].type.tensor_type.shape.dim
    kind = rng.choice(("none", "classes", "rank", "other", "sequence", "symbolic"))
    if kind == "none":
        del model.graph.output[:]
    elif kind == "classes":
        dims[1].dim_value = rng.choice((0, 1, 4, 6, 2**40, -1))
    elif kind == "rank":
        del dims[rng.randrange(2) :]
    elif kind == "other":
        model.graph.output[0].name = rng.choice(("a", "b", "stem.weight", "images", "classes", "nowhere"))
    elif kind == "sequence":
        model.graph.output[0].type.sequence_type.elem_type.tensor_type.elem_type = 1
    else:
        dims[1].dim_param = _name(rng)


def _versions(model: Any, rng: Random) -> None:
    if rng.random() < 0.5:
        model.ir_version = rng.choice((0, 1, 3, 100, 2**31, -1))
    else:
        model.opset_import[0].version = rng.choice((0, 1, 7, 99, 2**40, -1))
        model.opset_import[0].domain = rng.choice(("", "", "ai.onnx.ml", _name(rng)))


def _metadata(model: Any, rng: Random) -> None:
    item = rng.choice(model.metadata_props)
    kind = rng.choice(("value", "json", "drop", "key", "double", "many"))
    if kind == "value":
        item.value = rng.choice((_name(rng), "[" * 50_000, "1" * 5_000, "Infinity", "NaN", "{}", "[]", "null", "-1"))
    elif kind == "json":
        import json

        values = json.loads(item.value) if item.value[:1] in "[{" else {}
        if isinstance(values, dict) and values:
            values[rng.choice(sorted(values))] = choose_value(rng)
        item.value = dumps(values)
    elif kind == "drop":
        model.metadata_props.remove(item)
    elif kind == "key":
        item.key = rng.choice((_PREFIX, _PREFIX + _name(rng), _name(rng)))
    elif kind == "double":
        model.metadata_props.append(item)
    else:
        for number in range(5_000):
            model.metadata_props.add(key=f"{_PREFIX}{number}", value="{}")


def _texts(model: Any, rng: Random) -> None:
    field = rng.choice(("producer_name", "producer_version", "domain", "doc_string"))
    setattr(model, field, _name(rng))


def _function(model: Any, rng: Random) -> None:
    """A function that calls itself."""
    body = [helper.make_node("F", ["x"], ["y"], domain="f")]
    model.functions.append(helper.make_function("f", "F", ["x"], ["y"], body, [helper.make_opsetid("f", 1)]))
    model.opset_import.append(helper.make_opsetid("f", 1))
    rng.choice(model.graph.node).CopyFrom(helper.make_node("F", ["a"], ["b"], domain="f"))


_MUTATIONS: dict[str, Callable[[Any, Random], None]] = {
    "dims": _dims,
    "more dims": _more_dims,
    "data type": _type,
    "raw data": _raw,
    "values": _values,
    "name": _rename,
    "name of an edge": _rename_edge,
    "external data": _external,
    "missing initializer": _missing,
    "edge": _edge,
    "node": _node,
    "operator": _operator,
    "attribute": _attribute,
    "nested graphs": _nested,
    "input": _input,
    "output": _output,
    "versions": _versions,
    "metadata": _metadata,
    "texts": _texts,
    "function": _function,
}


@cache
def class_folders() -> Mapping[str, bytes]:
    """Ten pictures of five classes."""
    files = {}
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        files[f"data/{'abcde'[number % 5]}/{number}.png"] = stream.getvalue()
    return files


def _make(command: str, rng: Random) -> Case:
    if rng.random() < 0.2:
        content, name = mutate_bytes(whole_graph(), rng)
        mutation = f"bytes: {name}"
    else:
        content, mutation = mutate_graph(whole_graph(), rng)
    files = {"net.onnx": content, "weights.bin": torch.zeros(4_000).numpy().tobytes()}
    as_json = ("--json",) if rng.random() < 0.3 else ()
    if command == "verify":
        files["whole.onnx"] = whole_graph()
        models = rng.choice((("IN/net.onnx", "IN/whole.onnx"), ("IN/whole.onnx", "IN/net.onnx")))
        return Case(("verify", *models, *as_json), files, mutation)
    if command == "eval":
        return Case(("eval", "IN/net.onnx", "--data", "IN/data", *as_json), {**files, **class_folders()}, mutation)
    if command == "bench":
        few = ("--duration", "0", "--warmup", "0", "--iterations", "2", "--threads", "1")
        kind = rng.choice(((*few, "--batch", "1"), (*few, "--batch", "1,3"), ("--profile", "--duration", "0")))
        return Case(("bench", "IN/net.onnx", *kind, *as_json), files, mutation)
    if command == "predict":
        more = rng.choice(((), ("--logits",), ("--topk", "1")))
        files |= class_folders()
        return Case(("predict", "IN/net.onnx", "IN/data", "-o", "OUT/rows.jsonl", *more, *as_json), files, mutation)
    if command == "package":
        return Case(("package", "IN/net.onnx", "-o", "OUT", "--triton", *as_json), files, mutation)
    return Case(("inspect", "IN/net.onnx", *as_json), files, mutation)


def _maker(command: str) -> Callable[[Random], Case]:
    return lambda rng: _make(command, rng)


FORMATS = (
    Format("ONNX, inspect", _maker("inspect"), 2),
    Format("ONNX, verify", _maker("verify"), 2),
    Format("ONNX, eval", _maker("eval"), 1),
    Format("ONNX, predict", _maker("predict"), 1),
    Format("ONNX, bench", _maker("bench"), 1),
    Format("ONNX, package", _maker("package"), 1),
)
