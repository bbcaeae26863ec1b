"""`package`: an exported graph, or plans of it, as an entry of a Triton model repository, with its preprocessing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.artifacts import Array
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.files.typed_values import read_file
from repvgg_deploy.graphs.builder import OnnxGraph, write_graph
from repvgg_deploy.graphs.preprocessing import PIXELS, NetInput, make_preprocessing
from repvgg_deploy.hardware.cpu import require_memory
from repvgg_deploy.images.decoding import Pixels
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.runtime.session import GraphSession
from repvgg_deploy.serving import self_test
from repvgg_deploy.serving.golden import GoldenSet
from repvgg_deploy.serving.triton import (
    FILE_NAMES,
    LABELS_FILE,
    Device,
    ServedEnsemble,
    ServedModel,
    ServedTensor,
    make_labels,
)
from repvgg_deploy.workflows.package_checks import PreprocessingParity, compare_with_pillow, prepare, read_pictures
from repvgg_deploy.workflows.package_sources import Source, read_source

_DEFAULT_BATCH = 32


@dataclass(frozen=True)
class ServingOptions:
    """How the server runs the model.

    Attributes:
        max_batch: largest batch that requests are collected to; by default that of a plan, or 32.
        queue_delay_us: how long a request may wait for others.
        instances: copies of the model per device.
        device: by default a GPU for a plan, the CPU for an INT8 graph, and else whatever the server has.
        warm_up: run each batch size once before the model is ready.
        cuda_graphs: record a plan's kernels as CUDA graphs.
    """

    max_batch: int | None = None
    queue_delay_us: int = 100
    instances: int = 1
    device: Device | None = None
    warm_up: bool = True
    cuda_graphs: bool = True


@dataclass(frozen=True)
class PackageRequest:
    """What `package` writes.

    Attributes:
        models: one ONNX graph, or plans of one graph, each for another compute capability.
        output: the model repository.
        name: of the entry; by default after the first file.
        preprocess: also the preprocessing, and the two in a row.
        data: images on which the preprocessing is compared with Pillow; synthetic ones by default.
    """

    models: tuple[Path, ...]
    output: Path
    name: str | None = None
    serving: ServingOptions = ServingOptions()
    preprocess: bool = True
    data: Path | None = None


@dataclass(frozen=True)
class PackageResult:
    """What was written: `entries` are the names to send requests to, `golden` says if the model's outputs are there."""

    repository: str
    entries: tuple[str, ...]
    entry_version: int
    backend: str
    precision: str
    max_batch: int
    preferred: tuple[int, ...]
    preprocessing: PreprocessingParity | None
    golden: bool

    def to_dict(self) -> dict[str, Any]:
        """The object that `package --json` prints."""
        return asdict(self)


@dataclass(frozen=True)
class _Entry:
    """One folder of the repository; `graph` is written by this module, `files` are copied, by their new names."""

    config: ServedModel | ServedEnsemble
    files: Mapping[str, Path]
    graph: OnnxGraph | None
    golden: GoldenSet | None
    labels: tuple[str, ...] | None


def package(request: PackageRequest, progress: Progress = SILENT) -> PackageResult:
    """Write the next version of an entry and of what belongs to it, all at once, when everything has been checked.

    A `config.pbtxt` that is there already is kept, with what was changed in it by hand.

    Raises:
        DeployError: Triton cannot serve the models, they do not go together, or another model has the name.
        VerificationError: the preprocessing is too far from Pillow's.
    """
    source = read_source(request.models)
    if request.preprocess:
        _require_single(source)
    name = _entry_name(request)
    served = _served_model(source, name, request.serving)
    pictures = read_pictures(request.data)
    parity, entries = None, [_model_entry(source, served, pictures)]
    if request.preprocess:
        graph = make_preprocessing(
            source.preprocessing, NetInput(source.input.name, source.input.dtype, source.takes_pixels)
        )
        session = GraphSession(graph.to_proto())
        parity = compare_with_pillow(session, source, pictures)
        entries += _image_entries(source, served, graph, session.run({PIXELS: pictures[0]}), pictures[0])
    has_golden = entries[0].golden is not None
    if not has_golden:
        progress.note(
            f"note: no golden outputs of {source.files[0]}: there is no ONNX graph beside it that it was built from"
        )
    version = _publish(request.output, entries, progress)
    return PackageResult(
        repository=str(request.output),
        entries=tuple(entry.config.name for entry in entries),
        entry_version=version,
        backend=served.backend,
        precision=source.precision,
        max_batch=served.max_batch,
        preferred=served.preferred,
        preprocessing=parity,
        golden=has_golden,
    )


def _entry_name(request: PackageRequest) -> str:
    if request.name is None:
        return re.sub(r"[^A-Za-z0-9-]+", "_", request.models[0].stem).strip("_") or "model"
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", request.name):
        raise DeployError(f"{request.name!r} is not a valid model name", "letters, digits, _, - and .")
    return request.name


def _served_model(source: Source, name: str, options: ServingOptions) -> ServedModel:
    """The settings of the model, as far as it can take them."""
    device = options.device or _default_device(source)
    if source.backend == "tensorrt" and device != "gpu":
        raise DeployError(f"a TensorRT plan does not run on --device {device}", "package the ONNX graph for that")
    largest = source.batch_range[1] if source.batch_range is not None else None
    if options.max_batch is not None and source.fixed_batch:
        raise DeployError(
            f"{source.files[0]} takes batches of {source.fixed_batch} only", "leave --max-batch out, or export it again"
        )
    if options.max_batch is not None and largest is not None and options.max_batch > largest:
        raise DeployError(f"{source.files[0]} takes batches up to {largest}", "a smaller --max-batch")
    max_batch = 0 if source.fixed_batch else options.max_batch or largest or _DEFAULT_BATCH
    best = source.batch_range[0] if source.batch_range is not None else max(1, max_batch // 4)
    preferred = tuple(sorted({size for size in (best, max_batch) if 1 < size <= max_batch}))
    return ServedModel(
        name=name,
        backend=source.backend,
        inputs=(source.input,),
        outputs=source.outputs,
        max_batch=max_batch,
        preferred=preferred,
        queue_delay_us=options.queue_delay_us,
        instances=options.instances,
        device=device,
        plans={capability: f"model_{capability}.plan" for capability in source.capabilities},
        warm_up=options.warm_up,
        cuda_graphs=options.cuda_graphs and source.backend == "tensorrt",
    )


def _default_device(source: Source) -> Device:
    if source.backend == "tensorrt":
        return "gpu"
    # ONNX Runtime has no integer convolutions for CUDA: it would run them in float there.
    return "cpu" if source.precision == "int8" else "auto"


def _model_entry(source: Source, served: ServedModel, pictures: Sequence[Pixels]) -> _Entry:
    names = [served.plans[capability] for capability in source.capabilities] or [FILE_NAMES[served.backend]]
    files = dict(zip(names, source.files, strict=True))
    # The graph names the file of its large weights, which keeps its name.
    data = source.files[0].with_name(f"{source.files[0].name}.data")
    if served.backend == "onnxruntime" and data.is_file():
        files[data.name] = data
    golden = None
    if source.graph is not None:
        count = source.fixed_batch or 2
        prepared = [prepare(picture, source) for picture in pictures[:count]]
        require_memory(count * prepared[0].nbytes, f"the batch of {count} that {source.files[0]} takes")
        inputs = {source.input.name: np.concatenate([prepared[i % len(prepared)] for i in range(count)])}
        outputs = GraphSession(source.graph).run(inputs)
        if not all(np.isfinite(values).all() for values in outputs.values() if values.dtype.kind == "f"):
            raise VerificationError(
                f"{source.graph} gives NaN or Inf",
                "in FP16: values beyond 65504; compare it with its checkpoint: `verify`",
            )
        golden = GoldenSet(inputs, outputs, tuple(names), dynamic_batch=not source.fixed_batch)
    return _Entry(served, files, None, golden, source.class_names)


def _require_single(source: Source) -> None:
    if source.fixed_batch > 1:
        raise DeployError(
            f"{source.files[0]} takes batches of {source.fixed_batch}, and one image is prepared per request",
            "export it with a dynamic batch, or leave the preprocessing out: --no-preprocess",
        )


def _image_entries(
    source: Source, served: ServedModel, graph: OnnxGraph, prepared: Mapping[str, Array], picture: Pixels
) -> list[_Entry]:
    """The preprocessing, and the ensemble of it and the model."""
    first = ServedModel(
        name=f"{served.name}_preprocess",
        backend="onnxruntime",
        inputs=(ServedTensor(PIXELS, "uint8", (-1, -1, 3)),),
        outputs=(ServedTensor(source.input.name, source.input.dtype, (1, *source.input.shape[1:])),),
        instances=served.instances,
        # What is compared with Pillow is the CPU's kernel.
        device="cpu",
        warm_up=served.warm_up,
    )
    pixels = {PIXELS: picture}
    golden = GoldenSet(pixels, prepared)
    whole = GoldenSet(pixels, GraphSession(source.graph).run(prepared)) if source.graph is not None else None
    ensemble = ServedEnsemble(f"{served.name}_images", first, served)
    return [_Entry(first, {}, graph, golden, None), _Entry(ensemble, {}, None, whole, source.class_names)]


def _publish(repository: Path, entries: Sequence[_Entry], progress: Progress) -> int:
    """Write all folders as one set; an ensemble never stands there without its models."""
    folders = [repository / entry.config.name for entry in entries]
    kept = [_keep_config(folder, entry, progress) for folder, entry in zip(folders, entries, strict=True)]
    # One number for all of them: `self_test.py` looks for an ensemble's models under its own.
    version = 1 + max((number for folder in folders for number in _versions(folder)), default=0)

    def require_unused() -> None:
        taken = next((folder / str(version) for folder in folders if (folder / str(version)).exists()), None)
        if taken is not None:
            raise DeployError(f"another process has written {taken} meanwhile", "run the command again")

    with stage_files(repository, check=require_unused) as staging:
        for entry, is_kept in zip(entries, kept, strict=True):
            _write_entry(entry, staging / entry.config.name, version, is_kept)
        shutil.copyfile(Path(self_test.__file__), staging / "self_test.py")
    return version


def _versions(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def _keep_config(folder: Path, entry: _Entry, progress: Progress) -> bool:
    """Whether there is a config.pbtxt already, which is then one for the same tensors, files and classes.

    Raises:
        DeployError: it is another model's.
    """
    path, labels = folder / "config.pbtxt", folder / LABELS_FILE
    hint = "remove it, or choose another --name"
    try:
        config = read_file(path, str(path), hint).decode()
        known = read_file(labels, str(labels), hint).decode() if labels.exists() else ""
    except FileNotFoundError:
        return False
    except UnicodeDecodeError as error:
        raise DeployError(f"{path} or {labels.name} beside it is not text", hint) from error
    same_labels = entry.labels is None or known == make_labels(entry.labels)
    if not config.startswith(entry.config.head()) or not same_labels:
        raise DeployError(
            f"{folder} belongs to a model with other tensors, batches, files or classes",
            "choose another --name, or remove it",
        )
    if config != entry.config.to_pbtxt():
        progress.note(f"note: {path} is left unchanged; remove it to have it written again")
    return True


def _write_entry(entry: _Entry, staging: Path, version: int, keep_config: bool) -> None:
    folder = staging / str(version)
    folder.mkdir(parents=True)
    for name, source in entry.files.items():
        shutil.copyfile(source, folder / name)
    if entry.graph is not None:
        write_graph(entry.graph, folder / FILE_NAMES["onnxruntime"])
    if entry.golden is not None:
        entry.golden.write(folder)
    if keep_config:
        return
    (staging / "config.pbtxt").write_text(entry.config.to_pbtxt(), encoding="utf-8")
    if entry.labels is not None:
        (staging / LABELS_FILE).write_text(make_labels(entry.labels), encoding="utf-8")
