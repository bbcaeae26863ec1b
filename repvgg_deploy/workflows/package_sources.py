"""What `package` is given: an ONNX graph, or plans, as one description of what is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import file_kind, hash_file
from repvgg_deploy.runtime.model import open_model
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.serving.triton import Backend, ServedTensor

if TYPE_CHECKING:
    from repvgg_deploy.engine.sidecar import Sidecar

_SCORES = ("logits", "probabilities")


@dataclass(frozen=True)
class Source:
    """What is served.

    Attributes:
        files: the graph, or the plans in the order of `capabilities`.
        capabilities: compute capabilities, where there are several plans.
        fixed_batch: the only batch that it takes; 0 for a dynamic one.
        batch_range: best and largest batch of a plan.
        graph: an ONNX graph of the same model, that golden outputs come from.
    """

    backend: Backend
    files: tuple[Path, ...]
    input: ServedTensor
    outputs: tuple[ServedTensor, ...]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    precision: str
    graph: Path | None
    capabilities: tuple[str, ...] = ()
    batch_range: tuple[int, int] | None = None

    @property
    def fixed_batch(self) -> int:
        """The only batch, or 0."""
        return max(self.input.shape[0], 0)

    @property
    def takes_pixels(self) -> bool:
        """Whether the model takes uint8 NHWC and normalizes itself."""
        return self.input.dtype == "uint8"

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.input.shape[3 if self.takes_pixels else 1]


def read_source(models: Sequence[Path]) -> Source:
    """The models as one thing to serve.

    Raises:
        DeployError: one is missing, is a checkpoint or a plan that Triton does not load, or they do not go together.
    """
    for path in models:
        if not path.is_file():
            raise DeployError(f"there is no file {path}", "give what `export` wrote: an ONNX graph or a plan")
        if file_kind(path) == "checkpoint":
            raise DeployError(f"{path} is neither an ONNX graph nor a plan", "export it first: `repvgg-deploy export`")
    kinds = {file_kind(path) for path in models}
    if kinds == {"engine"}:
        return _read_plans(models)
    if len(models) > 1:
        raise DeployError(
            f"{models[1]} and {models[0]} cannot be one entry: several files are plans, each for another GPU",
            "package one model at a time, with a --name for each",
        )
    return _read_graph(models[0])


def _read_graph(path: Path) -> Source:
    model = open_model(path)
    runner = model.runner
    assert isinstance(runner, OnnxRunner)
    shapes = zip(runner.output_names, runner.output_shapes, strict=True)
    outputs = [ServedTensor(name, _dtype(runner.output_types[name]), _dims(shape)) for name, shape in shapes]
    first = ServedTensor(runner.input_name, _dtype(runner.input_type), _dims(runner.input_shape))
    if model.channels is None:
        raise DeployError(f"{path} takes any number of channels", "export it with the number that its images have")
    return _with_labels(
        Source(
            "onnxruntime",
            (path,),
            _sized(first, model.preprocessing),
            tuple(outputs),
            model.preprocessing,
            model.class_names,
            runner.precision,
            path,
        )
    )


def _dims(shape: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(-1 if size is None else size for size in shape)


def _dtype(name: str) -> str:
    """ONNX Runtime's `tensor(float)` in NumPy's words."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    return "float32" if inner == "float" else inner


def _sized(tensor: ServedTensor, preprocessing: Preprocessing) -> ServedTensor:
    """The input of a graph that takes any size, at the one that its images are prepared to."""
    size = (preprocessing.height, preprocessing.width)
    batch, *rest = tensor.shape
    if tensor.dtype == "uint8":
        return replace(tensor, shape=(batch, *size, rest[2]))
    return replace(tensor, shape=(batch, rest[0], *size))


def _with_labels(source: Source) -> Source:
    """The outputs with one score per class get the names; names that no output has a score for are left out."""
    names = source.class_names
    count = len(names) if names is not None else None
    outputs = tuple(
        replace(output, has_labels=output.name in _SCORES and output.shape[1:] == (count,)) for output in source.outputs
    )
    labelled = any(output.has_labels for output in outputs)
    return replace(source, outputs=outputs, class_names=names if labelled else None)


def _read_plans(plans: Sequence[Path]) -> Source:
    sides = [_read_side(plan) for plan in plans]
    first = sides[0]
    same = [side.onnx_sha256 == first.onnx_sha256 and side.inputs == first.inputs for side in sides]
    if not all(same):
        raise DeployError(
            f"{plans[same.index(False)]} was built from another graph than {plans[0]}",
            "build all plans from one ONNX graph, or package them with a --name for each",
        )
    order = range(len(plans)) if len(plans) == 1 else _order_by_capability(plans, sides)
    provenance = first.provenance
    if provenance is None or provenance.preprocessing is None:
        raise DeployError(f"{plans[0]} does not say how images become its input", "build it from what `export` wrote")
    (best, largest) = (min(side.profile[index] for side in sides) for index in (1, 2))
    tensors = [ServedTensor(tensor.name, tensor.dtype, tensor.shape) for tensor in (*first.inputs, *first.outputs)]
    source = Source(
        "tensorrt",
        tuple(plans[index] for index in order),
        tensors[0],
        tuple(tensors[1:]),
        provenance.preprocessing,
        provenance.class_names,
        first.precision,
        _find_graph(plans[0], first),
        tuple(_capability(plans[index], sides[index]) for index in order) if len(plans) > 1 else (),
        (best, largest),
    )
    smallest = max(side.profile[0] for side in sides)
    if not source.fixed_batch and smallest > 1:
        raise DeployError(
            f"{plans[0]} takes batches from {smallest} on, and Triton sends single requests too",
            f"build it again with --batch-range 1 {best} {largest}",
        )
    return _with_labels(source)


def _read_side(plan: Path) -> Sidecar:
    from repvgg_deploy.engine.sidecar import read_plan, read_sidecar, require_unchanged

    side = read_sidecar(plan)
    if side.backend != "tensorrt":
        raise DeployError(
            f"{plan} was built by {side.label}; Triton's TensorRT backend loads plans of TensorRT only",
            "package the ONNX graph, or build with --engine tensorrt on the GPU that will serve it",
        )
    require_unchanged(plan, read_plan(plan), side)
    if not side.has_weights:
        raise DeployError(f"{plan} has no weights, and Triton cannot add them", "`refit` it first")
    return side


def _order_by_capability(plans: Sequence[Path], sides: Sequence[Sidecar]) -> list[int]:
    found = [_capability(plan, side) for plan, side in zip(plans, sides, strict=True)]
    for index, capability in enumerate(found):
        if capability in found[:index]:
            other = plans[found.index(capability)]
            raise DeployError(
                f"{plans[index]} and {other} are both for compute capability {capability}", "give one plan for each"
            )
    return sorted(range(len(plans)), key=lambda index: found[index])


def _capability(plan: Path, side: Sidecar) -> str:
    if side.gpu is None:
        raise DeployError(f"{plan} does not say which GPU it was built on", "build it again: `repvgg-deploy export`")
    return side.gpu.compute_capability


def _find_graph(plan: Path, side: Sidecar) -> Path | None:
    """The graph beside a plan that it was built from."""
    path = plan.with_suffix(".onnx")
    return path if path.is_file() and hash_file(path) == side.onnx_sha256 else None
