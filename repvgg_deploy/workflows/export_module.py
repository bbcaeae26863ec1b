"""Any torch module with RepVGG blocks as a verified ONNX graph: fused, exported by torch, quantized, all checked."""

from __future__ import annotations

import copy
import hashlib
import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repvgg_deploy.artifacts import Array, Parity, Precision, Provenance
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.files import stage_files
from repvgg_deploy.fusion.fuse import find_blocks, fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.metadata import make_metadata
from repvgg_deploy.graphs.repvgg import DEFAULT_OPSET
from repvgg_deploy.graphs.torch_export import Dynamic, Signature, as_graph, export_torch, resolve_dynamic, to_half
from repvgg_deploy.nets.repvgg import FusedBlock
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.quantization.recipe import load_recipe
from repvgg_deploy.runtime.session import GraphSession
from repvgg_deploy.verification.outputs import compare_each, require_all
from repvgg_deploy.verification.parity import MAX_RELATIVE
from repvgg_deploy.workflows.export_stages import tool_versions
from repvgg_deploy.workflows.module_int8 import Feeds, QuantizedGraph, quantize_graph, take_examples
from repvgg_deploy.workflows.module_request import ChainSummary, ModuleExportResult

if TYPE_CHECKING:
    from repvgg_deploy.engine import Engine
    from repvgg_deploy.engine.building import Shapes

Example = Tensor | Sequence[Tensor]
"""The inputs of a module: one tensor, or several in the order of its forward."""

# Fused and original in float64; what is left is rounding.
_MAX_FLOAT64 = 1e-9
_CALIBRATION_COMPARED = 8
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
    tensors = _as_tuple(example)
    target = _check_target(Path(path))
    request = _Request(Precision(precision), Path(recipe) if isinstance(recipe, Path) else recipe, int8_layers, opset)
    if request.precision is Precision.INT8 and calibration is None:
        raise DeployError("INT8 needs calibration examples", "calibration=batches of typical inputs, never random data")
    backend = _find_backend(engine, progress)
    original = copy.deepcopy(module).eval()
    progress.note(f"fusing {type(module).__name__}")
    blocks = tuple(find_blocks(original))
    fused = fuse(original).eval().requires_grad_(False)
    names = tuple(input_names) if input_names is not None else _input_names(original, len(tensors))
    if len(names) != len(tensors):
        raise DeployError(f"{len(names)} input names for {len(tensors)} inputs", "give one name per input")
    wanted = resolve_dynamic(("batch",) if dynamic is None else dynamic, names, tensors)
    tensors = _with_a_batch(tensors, names, wanted)
    others = _of_another_size(tensors, names, wanted)
    _require_other_size(fused, others, names)
    outputs = _output_names(_run(fused, tensors), output_names)
    stage = _Stage(original, fused, blocks, Signature(names, outputs, wanted), tensors, others)
    parity: dict[str, dict[str, Parity]] = {"fused": _compare_fused(stage)}
    progress.note(f"exporting the fused module ({len(blocks)} blocks)")
    exported = export_torch(fused, tensors, stage.signature, opset)
    made = _make_graph(exported, stage, request, calibration, progress)
    with stage_files(target.absolute().parent) as staging:
        staged = staging / target.name
        graph = as_graph(made.model, _metadata(stage, request, made.quantized))
        write_graph(graph, staged)
        progress.note("running the graph in ONNX Runtime")
        parity |= _compare_graph(staged, exported, stage, made, request)
        built = None if backend is None else _build(staged, backend, stage, progress)
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
    opset: int


@dataclass(frozen=True)
class _Stage:
    """A module between fusing and its graph; `others` are random inputs, of another size where that is dynamic."""

    original: nn.Module
    fused: nn.Module
    blocks: tuple[str, ...]
    signature: Signature
    example: tuple[Tensor, ...]
    others: tuple[Tensor, ...]

    def feeds(self, tensors: Sequence[Tensor]) -> Feeds:
        return {name: tensor.numpy() for name, tensor in zip(self.signature.inputs, tensors, strict=True)}


@dataclass(frozen=True)
class _Made:
    """The graph to write; in INT8, how it was quantized and what it was calibrated on."""

    model: onnx.ModelProto
    quantized: QuantizedGraph | None = None
    examples: tuple[Feeds, ...] = ()


def _as_tuple(example: Example) -> tuple[Tensor, ...]:
    tensors = (example,) if isinstance(example, Tensor) else tuple(example)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise DeployError(
            "the example is not a tensor or a tuple of tensors", "give the inputs of the module's forward"
        )
    return tuple(tensor.detach().cpu() for tensor in tensors)


def _check_target(path: Path) -> Path:
    if path.suffix != ".onnx":
        raise DeployError(f"{path} does not end in .onnx", "give the name of the graph to write: net.onnx")
    if path.is_dir():
        raise DeployError(f"{path} is a directory", "give the name of the graph to write: net.onnx")
    return path


def _find_backend(name: str, progress: Progress) -> Any:
    if name == "none":
        return None
    from repvgg_deploy.engine import Unavailable, find_backend

    backend = find_backend(name)
    if isinstance(backend, Unavailable):
        progress.note(f"no engine will be built: {backend.reason}")
        return None
    return backend


def _input_names(module: nn.Module, count: int) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [name for name, item in inspect.signature(module.forward).parameters.items() if item.kind in kinds]
    return tuple(found[:count]) if len(found) >= count else tuple(f"input_{index}" for index in range(count))


def _with_a_batch(
    tensors: tuple[Tensor, ...], names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]
) -> tuple[Tensor, ...]:
    """`tensors`, twice in a batch where that is to be dynamic and is 1: torch takes a dimension of 1 as fixed."""
    return tuple(
        torch.cat([tensor, tensor]) if 0 in dynamic.get(name, {}) and len(tensor) == 1 else tensor
        for name, tensor in zip(names, tensors, strict=True)
    )


@torch.no_grad()
def _run(module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    return module(*(tensor.clone() for tensor in tensors))


def _leaves(outputs: Any) -> list[tuple[Any, Tensor]]:
    """The tensors of a module's output, each with where it is."""
    pairs = [(path, leaf) for path, leaf in pytree.tree_flatten_with_path(outputs)[0] if leaf is not None]
    if not pairs or not all(isinstance(leaf, Tensor) for _, leaf in pairs):
        raise DeployError("the module's output is not made of tensors", "give tensors, or tuples or dicts of them")
    return pairs


def _output_names(outputs: Any, given: Sequence[str] | None) -> tuple[str, ...]:
    leaves = _leaves(outputs)
    if given is not None:
        if len(given) != len(leaves):
            raise DeployError(f"{len(given)} output names for {len(leaves)} outputs", "give one name per output")
        return tuple(given)
    if len(leaves) == 1 and not leaves[0][0]:
        return ("output",)
    keys = ["_".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path) for path, _ in leaves]
    return tuple(f"output_{key}" if key[:1].isdigit() else key for key in keys)


def _named(stage: _Stage, outputs: Any) -> dict[str, Array]:
    values = (leaf.numpy() for _, leaf in _leaves(outputs))
    return dict(zip(stage.signature.outputs, values, strict=True))


def _of_another_size(
    tensors: Sequence[Tensor], names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]
) -> tuple[Tensor, ...]:
    """Random inputs in the range of the example's, of another size in what is dynamic; whole numbers are drawn anew."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for name, tensor in zip(names, tensors, strict=True):
        places = dynamic.get(name, {})
        # Sizes that most nets' strides divide.
        shape = [
            size if place not in places else size + 1 if place == 0 else size + max(32, size // 2 // 32 * 32)
            for place, size in enumerate(tensor.shape)
        ]
        if tensor.is_floating_point():
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            spread = tensor.double().std() if tensor.numel() > 1 else torch.tensor(1.0)
            made.append((noise * (spread if spread > 0 else 1.0) + tensor.double().mean()).to(tensor.dtype))
        else:
            chosen = torch.randint(tensor.numel(), shape, generator=generator)
            made.append(tensor.flatten()[chosen])
    return tuple(made)


def _require_other_size(module: nn.Module, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise DeployError if `module` does not run where a dimension said to be dynamic is another one."""
    try:
        _run(module, tensors)
    except RuntimeError as error:
        given = ", ".join(f"{n} {'x'.join(map(str, t.shape))}" for n, t in zip(names, tensors, strict=True))
        raise DeployError(
            f"{type(module).__name__} does not run on inputs of another size: {given}: {str(error).splitlines()[0]}",
            "leave out of `dynamic` what the module fixes",
        ) from error


def _compare_fused(stage: _Stage) -> dict[str, Parity]:
    """How the fused module differs from the original, in float64 where it runs in that.

    Raises:
        VerificationError: by more than rounding.
    """
    dtype: torch.dtype | None = torch.float64
    try:
        _run(copy.deepcopy(stage.original).double(), _cast(stage.example, dtype))
    except RuntimeError:
        # A forward that makes float32 tensors of its own.
        dtype = None
    limit = _MAX_FLOAT64 if dtype is not None else MAX_RELATIVE["stage"]["fp32"]
    worst: dict[str, Parity] = {}
    # Fused anew from float64: the rounding of its weights to float32 is what the graph is compared with later.
    nets = [copy.deepcopy(stage.original).to(dtype), fuse(copy.deepcopy(stage.original).to(dtype)).eval()]
    for tensors in (stage.example, stage.others):
        expected, given = (_named(stage, _run(net, _cast(tensors, dtype))) for net in nets)
        compared = compare_each(expected, given)
        require_all("fusing", compared, limit)
        worst = {
            name: max(parity, worst.get(name, parity), key=lambda p: p.relative) for name, parity in compared.items()
        }
    return worst


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    return tuple(tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for tensor in tensors)


def _make_graph(
    exported: onnx.ModelProto,
    stage: _Stage,
    request: _Request,
    calibration: Iterable[Example] | None,
    progress: Progress,
) -> _Made:
    if request.precision is Precision.FP16:
        return _Made(to_half(exported))
    if request.precision is Precision.FP32:
        return _Made(exported)
    assert calibration is not None
    recipe = load_recipe(request.recipe)
    examples = take_examples(calibration, stage.signature.inputs, recipe.count)
    weights = None
    if request.int8_layers == "blocks":
        parts = stage.fused.named_modules(remove_duplicate=False)
        weights = {f"{name}.conv.weight".lstrip(".") for name, part in parts if isinstance(part, FusedBlock)}
    quantized = quantize_graph(exported, weights, examples, recipe, progress)
    return _Made(quantized.model, quantized, examples)


def _compare_graph(
    staged: Path, exported: onnx.ModelProto, stage: _Stage, made: _Made, request: _Request
) -> dict[str, dict[str, Parity]]:
    """How the written graph's outputs in ONNX Runtime differ from those of the stage before, which may be INT8's own.

    Raises:
        VerificationError: by more than the precision's rounding; INT8 by more than the outputs themselves.
    """
    session = GraphSession(staged)
    if made.quantized is None:
        parity: dict[str, Parity] = {}
        for tensors in (stage.example, stage.others):
            compared = compare_each(_named(stage, _run(stage.fused, tensors)), session.run(stage.feeds(tensors)))
            require_all("the ONNX graph", compared, MAX_RELATIVE["stage"][request.precision])
            parity = {n: max(p, parity.get(n, p), key=lambda q: q.relative) for n, p in compared.items()}
        return {"onnx": parity}
    # Typical inputs alone: on noise the activations of a calibrated net mean nothing.
    feeds = [made.examples[0], *made.examples[1:_CALIBRATION_COMPARED]]
    exact, simulated = GraphSession(exported), GraphSession(made.quantized.model, optimized=False)
    merged = [_concatenate([run.run(feed) for feed in feeds]) for run in (exact, simulated, session)]
    quantized, run = compare_each(merged[0], merged[1]), compare_each(merged[1], merged[2])
    for name, parity_of in quantized.items():
        if not parity_of.relative < 1.0:
            raise VerificationError(
                f"output {name} no longer resembles its float values in INT8 (relative {parity_of.relative:.2g})",
                "give more, and more typical, calibration examples, or fp16",
            )
    require_all("the INT8 graph", run, MAX_RELATIVE["stage"]["int8"])
    return {"quantized": quantized, "onnx": run}


def _concatenate(results: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    import numpy as np

    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def _metadata(stage: _Stage, request: _Request, quantized: QuantizedGraph | None) -> dict[str, str]:
    extra: dict[str, Any] = {"blocks": list(stage.blocks)}
    if quantized is not None:
        extra["quantization"] = {
            "recipe": str(request.recipe),
            "images": quantized.examples,
            "images_sha256": quantized.examples_sha256,
            "chains": [[conv.weight for conv in q.chain.convs] for q in quantized.chains],
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


def _build(staged: Path, backend: Any, stage: _Stage, progress: Progress) -> Engine:
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
