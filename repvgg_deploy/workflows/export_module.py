"""Any torch module with RepVGG blocks as a verified ONNX graph: fused, exported by torch, quantized, all checked."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx
import torch
from torch import nn

from repvgg_deploy.artifacts import Parity, Precision, Provenance
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.fusion.fuse import find_blocks, fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.metadata import make_metadata
from repvgg_deploy.graphs.repvgg import DEFAULT_OPSET
from repvgg_deploy.graphs.torch_export import Dynamic, Signature, as_graph, export_torch, resolve_dynamic, to_half
from repvgg_deploy.nets.repvgg import FusedBlock
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.quantization.qat import QatScales
from repvgg_deploy.quantization.recipe import load_recipe
from repvgg_deploy.workflows.engine_backend import choose_backend
from repvgg_deploy.workflows.export_result import ChainSummary, ModuleExportResult
from repvgg_deploy.workflows.export_stages import tool_versions
from repvgg_deploy.workflows.module_checks import MadeGraph, ModuleStage, compare_engine, compare_fused, compare_graph
from repvgg_deploy.workflows.module_inputs import (
    Example,
    as_tuple,
    input_names_of,
    of_another_size,
    output_names_of,
    require_other_size,
    run_module,
    with_a_batch,
)
from repvgg_deploy.workflows.module_int8 import QuantizedGraph, quantize_graph, take_examples

if TYPE_CHECKING:
    from repvgg_deploy.engine import Engine
    from repvgg_deploy.engine.building import Shapes

# Of an engine, in examples.
_LARGEST_BATCH = 8


def export_module(
    module: nn.Module,
    example: Example,
    path: str | Path,
    *,
    precision: Precision | Literal["fp32", "fp16", "int8"] = "fp32",
    calibration: Iterable[Example] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Dynamic | None = None,
    engine: str = "none",
    recipe: str | Path = "accurate",
    int8_layers: Literal["blocks", "convolutions"] = "blocks",
    scales: QatScales | None = None,
    opset: int = DEFAULT_OPSET,
    progress: Progress = SILENT,
) -> ModuleExportResult:
    """Write the verified, simplified ONNX graph of any module with RepVGG blocks to `path`, and an engine if asked for.

    The blocks are fused in float64 (see `fuse`) and held against the module on the example and on random inputs; torch
    exports the fused module; ONNX Runtime runs the graph, whose outputs are compared one by one. The file appears when
    all of that has agreed. `module` itself is not changed; it is exported as in evaluation.

    Args:
        module: with a forward that takes tensors, and gives a tensor, or tuples, lists or dicts of them.
        example: the inputs, of the size of the graph where that is not dynamic.
        path: of the file to write, `.onnx`; the engine gets the same stem.
        precision: of the convolutions. In INT8 the chains of `int8_layers` are, and the rest stays float32.
        calibration: for INT8, batches of typical inputs, each like `example`; the recipe says how many are taken.
        input_names: by default the names of the forward's parameters.
        output_names: by default the keys of a dict, and `output` or `output_0`, `output_1`, … of others.
        dynamic: dimensions that are not fixed: some of `batch`, `height`, `width`, or names by input and dimension;
            by default `("batch",)`.
        engine: `none`, `auto`, `tensorrt` or `tensorrt-rtx`. It is tuned for the example's size; what is dynamic may be
            a batch from 1 to eight times the example's, and half to twice its other sizes.
        recipe: of the quantization, a name in `calibration/` or a TOML file; what is learned in it is left out.
        int8_layers: the RepVGG blocks' convolutions, or all convolutions.
        scales: for INT8 of the blocks of a trained module, what `convert_qat` returned with it: its kernels over these
            scales are the integers then. Scales that other layers need come from `calibration`.
        opset: of the graph.
        progress: told what is going on.

    Raises:
        DeployError: there is no block, torch cannot export the module, two stages do not agree, an option does not fit.

    Example:
        >>> from repvgg_deploy import build, export_module, load_checkpoint
        >>> net = build(load_checkpoint("net.pth"))
        >>> export_module(net, torch.rand(1, 3, 64, 64), "whole.onnx").parity["onnx"]["output"].relative < 1e-4
        True
    """
    start = time.perf_counter()
    tensors = as_tuple(example)
    target = _check_target(Path(path))
    request = _Request(Precision(precision), recipe, int8_layers, scales, opset)
    if request.precision is Precision.INT8 and calibration is None:
        raise DeployError("INT8 needs calibration examples", "calibration=batches of typical inputs, never random data")
    backend = choose_backend(engine, progress)
    original = copy.deepcopy(module).eval()
    progress.note(f"fusing {type(module).__name__}")
    blocks = tuple(find_blocks(original))
    fused = fuse(original).eval().requires_grad_(False)
    names = tuple(input_names) if input_names is not None else input_names_of(original, len(tensors))
    if len(names) != len(tensors):
        raise DeployError(f"{len(names)} input names for {len(tensors)} inputs", "give one name per input")
    wanted = resolve_dynamic(("batch",) if dynamic is None else dynamic, names, tensors)
    tensors = with_a_batch(tensors, names, wanted)
    others = of_another_size(tensors, names, wanted)
    require_other_size(fused, others, names)
    outputs = output_names_of(run_module(fused, tensors), output_names)
    stage = ModuleStage(original, fused, blocks, Signature(names, outputs, wanted), tensors, others)
    parity: dict[str, dict[str, Parity]] = {"fused": compare_fused(stage)}
    progress.note(f"exporting the fused module ({len(blocks)} blocks)")
    exported = export_torch(fused, tensors, stage.signature, opset)
    made = _make_graph(exported, stage, request, calibration, progress)
    with stage_files(target.absolute().parent) as staging:
        staged = staging / target.name
        graph = as_graph(made.model, _metadata(stage, request, made.quantized))
        write_graph(graph, staged)
        progress.note("running the graph in ONNX Runtime")
        parity |= compare_graph(staged, exported, stage, made, request.precision)
        built = None
        if backend is not None:
            built = _build(staged, backend, stage, progress)
            compared = compare_engine(built, staged, stage, progress)
            parity |= {"engine": compared} if compared else {}
    quantized = made.quantized.chains if made.quantized is not None else ()
    return ModuleExportResult(
        onnx=target,
        engine=built,
        module=type(original).__name__,
        precision=request.precision,
        blocks=blocks,
        inputs=names,
        outputs=outputs,
        parameters=sum(parameter.numel() for parameter in fused.parameters()),
        sha256=_hash_weights(fused),
        ops=graph.op_histogram(),
        parity=parity,
        chains=tuple(
            ChainSummary(tuple(conv.weight.removesuffix(".weight") for conv in q.chain.convs), q.output_db)
            for q in quantized
        ),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Request:
    precision: Precision
    recipe: str | Path
    int8_layers: str
    scales: QatScales | None
    opset: int


def _check_target(path: Path) -> Path:
    if path.suffix != ".onnx":
        raise DeployError(f"{path} does not end in .onnx", "give the name of the graph to write: net.onnx")
    if path.is_dir():
        raise DeployError(f"{path} is a directory", "give the name of the graph to write: net.onnx")
    return path


def _make_graph(
    exported: onnx.ModelProto,
    stage: ModuleStage,
    request: _Request,
    calibration: Iterable[Example] | None,
    progress: Progress,
) -> MadeGraph:
    if request.scales is not None and request.precision is not Precision.INT8:
        raise DeployError(f"scales are for INT8, not for {request.precision}", 'precision="int8", or leave them out')
    if request.precision is Precision.FP16:
        return MadeGraph(to_half(exported))
    if request.precision is Precision.FP32:
        return MadeGraph(exported)
    assert calibration is not None
    recipe = load_recipe(request.recipe)
    if recipe.full_range:
        raise DeployError(
            f"the recipe {recipe.name} has activations up to 255, which the INT8 of a module has not",
            "leave out full_range",
        )
    examples = take_examples(calibration, stage.signature.inputs, recipe.count)
    weights = None
    if request.int8_layers == "blocks":
        parts = stage.fused.named_modules(remove_duplicate=False)
        weights = {f"{name}.conv.weight".lstrip(".") for name, part in parts if isinstance(part, FusedBlock)}
    learned = None
    if request.scales is not None:
        learned = {f"{name}.conv.weight": layer for name, layer in request.scales.layers.items()}
    quantized = quantize_graph(exported, weights, examples, recipe, progress, learned)
    return MadeGraph(quantized.model, quantized, examples)


def _metadata(stage: ModuleStage, request: _Request, quantized: QuantizedGraph | None) -> dict[str, str]:
    extra: dict[str, Any] = {"blocks": list(stage.blocks)}
    if quantized is not None:
        extra["quantization"] = {
            "recipe": str(request.recipe) if request.scales is None else "learned scales",
            "images": quantized.examples,
            "images_sha256": quantized.examples_sha256,
            "chains": [[conv.weight for conv in q.chain.convs] for q in quantized.chains],
            **({"full_range": True} if request.scales is not None and request.scales.full_range else {}),
        }
    provenance = Provenance(
        sha256=_hash_weights(stage.fused),
        arch=type(stage.original).__name__,
        layout="module",
        form="deploy" if not stage.blocks else "train",
        precision=request.precision,
        preprocessing=None,
        class_names=None,
        tools=tool_versions(),
        extra=extra,
    )
    return make_metadata(provenance)


def _hash_weights(module: nn.Module) -> str:
    """The sha256 of a module's tensors, names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _build(staged: Path, backend: Any, stage: ModuleStage, progress: Progress) -> Engine:
    from repvgg_deploy.engine import BuildOptions, build_engine

    progress.note(f"building the engine with {backend.label}")
    shapes = {
        name: _profile(tuple(tensor.shape), stage.signature.dynamic.get(name, {}))
        for name, tensor in zip(stage.signature.inputs, stage.example, strict=True)
    }
    return build_engine(staged, backend, BuildOptions(), staged.parent, progress, shapes)


def _profile(shape: tuple[int, ...], dynamic: Mapping[int, str]) -> Shapes:
    """The smallest, best and largest shape of an engine's input; see `export_module`."""

    def scaled(share: float, batch: int) -> tuple[int, ...]:
        return tuple(
            size if place not in dynamic else batch if place == 0 else max(1, int(size * share))
            for place, size in enumerate(shape)
        )

    return scaled(0.5, 1), shape, scaled(2.0, _LARGEST_BATCH * shape[0])
