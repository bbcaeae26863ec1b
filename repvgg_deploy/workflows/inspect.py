"""What a file is: a checkpoint, an ONNX graph or an engine, described without running it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import file_kind, hash_file
from repvgg_deploy.files.typed_values import parse_json
from repvgg_deploy.nets.cards import RepVGGCard, match_card, require_arch
from repvgg_deploy.nets.cost import count_flops, count_parameters
from repvgg_deploy.nets.preprocessing import choose_preprocessing

if TYPE_CHECKING:
    from repvgg_deploy.checkpoints import Checkpoint, CheckpointOptions

Description = dict[str, Any]


def inspect_file(path: Path, arch: str | None = None) -> Description:
    """What an ONNX graph or an engine consists of and comes from, or a checkpoint, ready for a table or JSON.

    For a graph or a checkpoint torch is not imported; see `inspect_checkpoint` for a checkpoint's options.

    Raises:
        DeployError: the file is none of these, is damaged, or is not of the architecture `arch`.
    """
    if path.is_file() and file_kind(path) == "engine":
        from repvgg_deploy.engine.inspection import inspect_engine

        report = inspect_engine(path)
        require_arch(path, report.side.provenance, arch)
        return report.to_dict()
    if path.is_file() and file_kind(path) == "onnx":
        return _describe_graph(path, arch)
    from repvgg_deploy.checkpoints import CheckpointOptions

    return inspect_checkpoint(path, CheckpointOptions(arch))


def inspect_checkpoint(path: Path, options: CheckpointOptions) -> Description:
    """What a checkpoint consists of and comes from; `options` say how it is read.

    Raises:
        DeployError: it cannot be read, or not so.
    """
    return _describe_checkpoint(options.load(path))


def describe_card(card: RepVGGCard) -> Description:
    """A row of `archs`: parameters and FLOPs are computed from the net, top-1 is the published one."""
    spec = card.spec()
    size = card.preprocessing.height
    return {
        "arch": card.name,
        "blocks": list(card.blocks),
        "widths": [card.stem, *card.widths],
        "groups": card.groups,
        "squeeze_excite": f"C//{card.se_ratio} {card.se_position} ReLU" if card.se_ratio else None,
        "parameters": count_parameters(spec),
        "parameters_deploy": count_parameters(spec.fused()),
        "input_size": size,
        "flops": count_flops(spec, size, size),
        "flops_deploy": count_flops(spec.fused(), size, size),
        "top1": card.published.top1,
        "top5": card.published.top5,
        "source": card.source,
    }


def _describe_checkpoint(checkpoint: Checkpoint) -> Description:
    from repvgg_deploy.workflows.choices import describe_choices

    spec = checkpoint.spec
    card = match_card(spec)
    nothing = PreprocessingOptions()
    preprocessing = choose_preprocessing(spec, nothing, checkpoint.settings)
    assumed = describe_choices(checkpoint, preprocessing, nothing)
    height, width = preprocessing.height, preprocessing.width
    squeeze = next((b.squeeze_excite for b in spec.blocks if b.squeeze_excite is not None), None)
    return {
        "file": str(checkpoint.path),
        "kind": "checkpoint",
        "layout": checkpoint.layout,
        "form": checkpoint.form,
        "ema": checkpoint.is_ema,
        "arch": checkpoint.arch,
        "card": card.name if card else None,
        "blocks": [len(stage) for stage in spec.stages],
        "widths": [stage[-1].out_channels for stage in spec.stages],
        "groups": sorted({block.groups for block in spec.blocks}),
        "squeeze_excite": f"{squeeze.position} ReLU" if squeeze else None,
        "classes": spec.classes,
        "class_names": list(checkpoint.class_names) if checkpoint.class_names else None,
        "in_channels": spec.in_channels,
        "parameters": count_parameters(spec),
        "parameters_deploy": count_parameters(spec.fused()),
        "input_size": [height, width],
        "assumed": assumed,
        "flops": count_flops(spec, height, width),
        "flops_deploy": count_flops(spec.fused(), height, width),
        "notes": list(checkpoint.notes),
        "sha256": checkpoint.sha256,
    }


def _describe_graph(path: Path, arch: str | None) -> Description:
    import math

    import onnx

    from repvgg_deploy.graphs.metadata import METADATA_PREFIX, read_metadata
    from repvgg_deploy.graphs.reading import read_graph

    model = read_graph(path)
    properties = {p.key: p.value for p in model.metadata_props}
    require_arch(path, read_metadata(properties), arch)
    ops = [node.op_type for node in model.graph.node]
    weights = _find_parameters(model, is_ours="repvgg_deploy.version" in properties)
    return {
        "file": str(path),
        "kind": "onnx",
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": next((o.version for o in model.opset_import if not o.domain), None),
        "ir_version": model.ir_version,
        "inputs": [_describe_tensor(item) for item in model.graph.input],
        "outputs": [_describe_tensor(item) for item in model.graph.output],
        "ops": {op: ops.count(op) for op in sorted(set(ops))},
        "parameters": sum(math.prod(item.dims) for item in weights),
        "weight_types": sorted({_type_name(item.data_type) for item in weights}),
        "bytes": path.stat().st_size,
        "external_data": any(item.data_location == onnx.TensorProto.EXTERNAL for item in weights),
        "sha256": hash_file(path),
        "provenance": {
            key.removeprefix(METADATA_PREFIX): _parse_metadata(value)
            for key, value in properties.items()
            if key.startswith(METADATA_PREFIX)
        },
        "metadata": {key: value for key, value in properties.items() if not key.startswith(METADATA_PREFIX)},
    }


def _parse_metadata(text: str) -> Any:
    """The value of an entry of a graph's metadata: objects, lists and whole numbers are JSON there, the rest text."""
    if text[:1] in "[{" or (text.isdecimal() and len(text) < 16):
        with suppress(DeployError):
            return parse_json(text.encode("utf-8", "surrogatepass"), "the entry", "")
    return text


# What is no parameter among the inputs of an operator, by their places: scales, zero-points, shapes, statistics.
_BESIDE = {
    "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7), "BatchNormalization": (3, 4), "Clip": (1, 2), "Pad": (2,), "Resize": (1, 2, 3),
}  # fmt: skip


def _find_parameters(model: Any, is_ours: bool) -> list[Any]:
    """The constant tensors that are parameters; a shape, a scale of Q/DQ or the pixels' normalization is none."""
    import onnx

    found = list(model.graph.initializer)
    if is_ours:
        return [item for item in found if item.name.endswith((".weight", ".bias"))]
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                attribute.t.name = node.output[0]
                found.append(attribute.t)
    beside = {
        node.input[place]
        for node in model.graph.node
        for place in _BESIDE.get(node.op_type, ())
        if place < len(node.input)
    }
    types = onnx.TensorProto
    learned = (types.FLOAT, types.FLOAT16, types.BFLOAT16, types.DOUBLE, types.INT8, types.UINT8, types.INT32)
    return [item for item in found if len(item.dims) and item.data_type in learned and item.name not in beside]


def _describe_tensor(info: Any) -> Description:
    kind = info.type.tensor_type
    shape = [dimension.dim_param or dimension.dim_value for dimension in kind.shape.dim]
    return {"name": info.name, "dtype": _type_name(kind.elem_type), "shape": shape}


def _type_name(number: int) -> str:
    """The name of a data type of ONNX; its number if it has none, as one of a later ONNX or of a damaged file."""
    import onnx

    names = dict(zip(onnx.TensorProto.DataType.values(), onnx.TensorProto.DataType.keys(), strict=True))
    return str(names.get(number, f"type {number}")).lower()
