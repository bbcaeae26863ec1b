"""Any torch module as a simplified ONNX graph, through torch's own exporter."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, TypeAlias

import onnx
import onnx.checker
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import repvgg_deploy
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.graphs.builder import TWO_GIB, OnnxGraph

Dynamic: TypeAlias = Sequence[str] | Mapping[str, Mapping[int, str]]
"""Which dimensions are not fixed: some of `batch`, `height` and `width` for every input, or names by input and index.

A sequence means dimension 0 of every input, and 2 and 3 of those with four dimensions.
"""

_PLACES = {"batch": 0, "height": 2, "width": 3}


@dataclass(frozen=True)
class Signature:
    """What a module takes and gives: names of its inputs and outputs, and `dynamic` dimensions by input."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]


def resolve_dynamic(dynamic: Dynamic, inputs: Sequence[str], example: Sequence[Tensor]) -> dict[str, dict[int, str]]:
    """The names of the dynamic dimensions by input and index.

    Raises:
        DeployError: a name is unknown, or a dimension is not there.
    """
    if isinstance(dynamic, Mapping):
        unknown = set(dynamic) - set(inputs)
        if unknown:
            raise DeployError(f"no input is called {sorted(unknown)[0]!r}", f"one of: {', '.join(inputs)}")
        return {name: dict(sorted(dynamic[name].items())) for name in inputs if name in dynamic}
    unknown = set(dynamic) - _PLACES.keys()
    if unknown:
        raise DeployError(f"dynamic={sorted(unknown)[0]!r} is not a dimension", f"some of: {', '.join(_PLACES)}")
    places = {_PLACES[name]: name for name in sorted(dynamic, key=lambda name: _PLACES[name])}
    return {
        name: {
            place: label
            for place, label in places.items()
            if place < tensor.dim() and (place == 0 or tensor.dim() == 4)
        }
        for name, tensor in zip(inputs, example, strict=True)
    }


def export_torch(module: nn.Module, example: Sequence[Tensor], signature: Signature, opset: int) -> onnx.ModelProto:
    """The simplified, checked ONNX graph of `module` in evaluation, with its weights and without any metadata.

    Raises:
        GraphError: torch cannot export it, or what it exports is not valid.
        DeployError: `onnxscript`, which torch's exporter needs, is not installed.
    """
    dims = torch.export.Dim
    shapes = tuple(dict.fromkeys(signature.dynamic.get(name, {}), dims.DYNAMIC) for name in signature.inputs)
    name = type(module).__name__
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise DeployError(
            "onnxscript is not installed, and torch cannot export modules without it",
            "pip install 'repvgg-deploy[modules]'",
        ) from error
    # The exporter prints, warns of and logs its own progress; what a user needs of it is in its exception.
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            program = torch.onnx.export(
                module,
                tuple(example),
                dynamo=True,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_shapes=shapes,
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:
            # The exporter runs the module's own code, so it can raise any exception.
            raise GraphError(f"torch cannot export {name}: {_reason(error)}", _hint(signature)) from error
        finally:
            logging.disable(before)
    assert program is not None
    try:
        model = program.model_proto
        size = model.ByteSize()
    except ValueError as error:
        raise GraphError(f"{name} has more than 2 GiB of weights", "such modules are not supported") from error
    if size > TWO_GIB:
        raise GraphError(f"{name} has more than 2 GiB of weights", "such modules are not supported")
    return _cleaned(model, signature)


def _reason(error: BaseException) -> str:
    """The innermost reason, in one line: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _hint(signature: Signature) -> str:
    if any(signature.dynamic.values()):
        return "fix the shapes with dynamic=(), or change the forward where it branches on values or sizes"
    return "change the forward where it branches on values; torch.export.export(module, example) shows where"


def _cleaned(model: onnx.ModelProto, signature: Signature) -> onnx.ModelProto:
    """`model` simplified and checked, without what torch and onnxsim note of their own run, its paths among it."""
    import onnxsim

    model = onnxsim.simplify(model, check_n=0)[0]
    _name_dimensions(model, signature)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for item in [*model.graph.initializer, *model.graph.input, *model.graph.output]:
        del item.metadata_props[:]
        item.doc_string = ""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    model.graph.name, model.graph.doc_string, model.doc_string = "module", "", ""
    model.producer_name, model.producer_version = "repvgg-deploy", repvgg_deploy.__version__
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    _name_nodes(model)
    check(model)
    return model


def check(model: onnx.ModelProto) -> None:
    """Raise GraphError if `model` is not valid ONNX."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the graph is not valid ONNX: {str(error).splitlines()[0]}", "try another opset") from error


def _name_dimensions(model: onnx.ModelProto, signature: Signature) -> None:
    """Give the dynamic dimensions the names of `signature` instead of torch's symbols.

    Raises:
        GraphError: torch has fixed one of them.
    """
    names: dict[str, str] = {}
    for item in model.graph.input:
        for place, name in signature.dynamic.get(item.name, {}).items():
            dimension = item.type.tensor_type.shape.dim[place]
            if not dimension.dim_param:
                raise GraphError(
                    f"the {name} of {item.name} is {dimension.dim_value} in the graph, so it cannot be dynamic",
                    "leave it out of `dynamic`: the module fixes it",
                )
            names.setdefault(dimension.dim_param, name)
    for item in [*model.graph.input, *model.graph.output]:
        for dimension in item.type.tensor_type.shape.dim:
            if dimension.dim_param:
                # That of an output may be an expression of several symbols.
                dimension.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), dimension.dim_param)


def _name_nodes(model: onnx.ModelProto) -> None:
    """Name every node after the tensor that it makes: names are then unique and the same in every run."""
    for node in model.graph.node:
        node.name = next(name for name in node.output if name)


def as_graph(model: onnx.ModelProto, metadata: Mapping[str, str]) -> OnnxGraph:
    """`model` in two parts, with `metadata`; see `repvgg_deploy.graphs.builder.write_graph`."""
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    helper.set_model_props(bare, dict(sorted(metadata.items())))
    return OnnxGraph(bare, weights)


def sort_nodes(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """`nodes` in an order in which every tensor is made before it is read, else as they were."""
    makers = {output: node for node in nodes for output in node.output if output}
    placed: dict[int, onnx.NodeProto] = {}
    for node in nodes:
        waiting: list[tuple[Any, bool]] = [(node, False)]
        while waiting:
            current, ready = waiting.pop()
            if id(current) in placed:
                continue
            if ready:
                placed[id(current)] = current
                continue
            waiting.append((current, True))
            needed = [makers[name] for name in reversed(current.input) if name in makers]
            waiting += [(maker, False) for maker in needed if id(maker) not in placed]
    return list(placed.values())


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with float16 weights and tensors; its inputs and outputs keep their types.

    Raises:
        GraphError: a weight does not fit float16.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for item in model.graph.initializer:
        if item.data_type == onnx.TensorProto.FLOAT:
            largest = float(abs(numpy_helper.to_array(item)).max(initial=0.0))
            if largest >= 65520.0:
                raise GraphError(
                    f"a weight does not fit FP16 (largest 65504): {item.name} reaches {largest:.3g}",
                    "export with fp32 or int8",
                )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        half: onnx.ModelProto = convert_float_to_float16(copied, keep_io_types=True)
    # The converter appends its Casts behind all other nodes, and ONNX wants every tensor made before it is read.
    nodes = sort_nodes(half.graph.node)
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    del half.graph.value_info[:]
    _name_nodes(half)
    check(half)
    return half
