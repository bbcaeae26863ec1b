"""`build_engine`: an ONNX file becomes a plain TensorRT plan and the sidecar that says what it is."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from repvgg_deploy.artifacts import Provenance
from repvgg_deploy.engine.backends import Backend, has
from repvgg_deploy.engine.cancellation import make_monitor
from repvgg_deploy.engine.log import collect_messages, explain_failure
from repvgg_deploy.engine.network import ParsedNetwork, parse_onnx, read_convolution_precisions, require_precision
from repvgg_deploy.engine.options import BuildOptions
from repvgg_deploy.engine.sidecar import Sidecar, sidecar_path
from repvgg_deploy.engine.timing_cache import use_timing_cache
from repvgg_deploy.errors import GraphError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.graphs.metadata import read_metadata
from repvgg_deploy.graphs.serialization import read_onnx_metadata
from repvgg_deploy.hardware.gpus import find_gpus
from repvgg_deploy.hardware.threads import Cancellation, run_cancellable, start_workers
from repvgg_deploy.progress import SILENT, Progress

Shapes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The smallest, best and largest shape of an input."""


@dataclass(frozen=True)
class Engine:
    """A built engine: the plan, and what its sidecar says."""

    plan: Path
    side: Sidecar

    @property
    def sidecar_path(self) -> Path:
        """The file beside the plan."""
        return sidecar_path(self.plan)


@dataclass
class _PlanWriter:
    """Receives the plan from the library piece by piece, so that no second copy is in memory."""

    file: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0
    seconds: float = 0.0
    error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write one piece; 0 tells the library that this failed."""
        start = time.perf_counter()
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            return 0
        self.digest.update(data)
        self.size += len(data)
        self.seconds += time.perf_counter() - start
        return len(data)


def build_engine(
    onnx: Path,
    backend: Backend,
    options: BuildOptions,
    folder: Path,
    progress: Progress = SILENT,
    shapes: Mapping[str, Shapes] | None = None,
) -> Engine:
    """Build `onnx` and write `<stem>.plan` and `<stem>.plan.json` to `folder`, a folder of `stage_files`.

    The network is strongly typed, so the engine has the precision of the graph. Ctrl-C ends the build and is raised
    as KeyboardInterrupt; the folder is then the caller's to drop. With `shapes` the graph may be any network: they are
    the profile of its dynamic inputs by name; without them it is an image classifier with a batch of `options`.

    Raises:
        GraphError: the library refuses the graph, or its convolutions are not in the precision that it declares.
        DeployError: an option does not fit, there is no GPU where one is needed, it has too little memory, …
        OSError: the plan cannot be written.
    """
    start = time.perf_counter()
    options.check(backend)
    # Hashed on another core while the build runs.
    with start_workers(1) as pool:
        provenance = read_metadata(read_onnx_metadata(onnx))
        require_signed_range(onnx, provenance)
        onnx_hash = pool.submit(hash_file, onnx)
        found = find_gpus()
        parsing = time.perf_counter()
        parsed = parse_onnx(backend, onnx, classifier=shapes is None)
        parsed_at = time.perf_counter()
        convolutions = _check_precisions(backend, parsed, provenance)
        plan = folder / f"{onnx.stem}.plan"
        written = _write_plan(backend, parsed, options, shapes, plan, progress)
        side = Sidecar(
            sha256=written.sha256,
            bytes=written.size,
            backend=backend.name,
            backend_version=backend.version,
            gpu=found.gpus[0] if found.gpus else None,
            driver=found.driver,
            profile=written.profile,
            inputs=parsed.inputs,
            outputs=parsed.outputs,
            options=options,
            convolutions=convolutions,
            onnx_sha256=onnx_hash.result(),
            provenance=provenance,
            warnings=written.warnings,
            has_weights=not options.strip_weights,
            seconds={
                "parser": parsed_at - parsing,
                "builder": written.builder_s,
                "writing": written.writing_s,
                "total": time.perf_counter() - start,
            },
        )
    sidecar_path(plan).write_text(side.to_json(), encoding="utf-8")
    return Engine(plan, side)


def require_signed_range(onnx: Path, provenance: Provenance | None) -> None:
    """Raise GraphError if an INT8 graph has activations up to 255: an engine would clip them at 127, half of that."""
    about = None if provenance is None else provenance.extra.get("quantization")
    if isinstance(about, dict) and about.get("full_range"):
        raise GraphError(
            f"the activations of {onnx.name} go up to 255, and TensorRT saturates at 127",
            "run it in ONNX Runtime or OpenVINO; or train without --full-range",
        )


@dataclass(frozen=True)
class _WrittenPlan:
    """A plan on the disk, and what its build says of it."""

    sha256: str
    size: int
    profile: tuple[int, int, int]
    warnings: tuple[str, ...]
    builder_s: float
    writing_s: float


def _write_plan(
    backend: Backend,
    parsed: ParsedNetwork,
    options: BuildOptions,
    shapes: Mapping[str, Shapes] | None,
    plan: Path,
    progress: Progress,
) -> _WrittenPlan:
    """Build a parsed network into the file `plan`, with the timing cache where `options` want it."""
    found = find_gpus()
    gpu = found.gpus[0] if found.gpus else None
    with collect_messages(backend) as messages, _open_plan(plan) as writer:
        config, profile = _configure(backend, parsed, options, shapes)
        with use_timing_cache(backend, config, gpu, progress) if options.timing_cache else nullcontext():
            # Messages about a stored cache are not about this build: the library continues with an empty cache.
            messages.clear()
            start = time.perf_counter()
            if not _build(backend, parsed, config, writer, progress):
                raise explain_failure(backend, "the engine build", messages, options.needs_refit)
            seconds = time.perf_counter() - start
        warnings = tuple(dict.fromkeys(messages.warnings))
    return _WrittenPlan(
        writer.digest.hexdigest(), writer.size, profile, warnings, seconds - writer.seconds, writer.seconds
    )


def _check_precisions(backend: Backend, parsed: ParsedNetwork, provenance: Provenance | None) -> dict[str, int]:
    precisions = read_convolution_precisions(backend, parsed.network)
    if provenance is not None:
        require_precision(precisions, provenance.precision)
    values = list(precisions.values())
    return {precision: values.count(precision) for precision in sorted(set(values))}


def _configure(
    backend: Backend, parsed: ParsedNetwork, options: BuildOptions, shapes: Mapping[str, Shapes] | None = None
) -> tuple[Any, tuple[int, int, int]]:
    """The builder's configuration, and the profile that it holds."""
    trt = backend.module
    config = parsed.builder.create_builder_config()
    # Layer names, types and formats stay in the engine for the inspector.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatibility != "none":
        levels = trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = {
            "ampere+": levels.AMPERE_PLUS,
            "same-compute-capability": levels.SAME_COMPUTE_CAPABILITY,
        }[options.hardware_compatibility]
    flags = {
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
        trt.BuilderFlag.REFIT: options.needs_refit,
        trt.BuilderFlag.STRIP_PLAN: options.strip_weights,
    }
    for flag in (flag for flag, wanted in flags.items() if wanted):
        config.set_flag(flag)
    if has(trt, "BuilderFlag.REQUIRE_USER_ALLOCATION"):
        # TensorRT-RTX from 1.2 on: without it an engine may allocate while it is enqueued, which no capture allows.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    _set_targets(trt, config, options)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if shapes is not None:
        return config, _add_shapes(parsed, config, shapes)
    return config, _add_profile(parsed, config, options)


def _set_targets(trt: Any, config: Any, options: BuildOptions) -> None:
    """Name the GPUs that the plan is for, if the library has that setting; by default it chooses them itself."""
    settable = has(trt, "IBuilderConfig.num_compute_capabilities") and has(trt, "IBuilderConfig.set_compute_capability")
    if options.compute_capabilities and settable:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, target in enumerate(options.compute_capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__["SM" + target.replace(".", "")], index)


def _add_profile(parsed: ParsedNetwork, config: Any, options: BuildOptions) -> tuple[int, int, int]:
    name, (batch, *rest) = parsed.images.name, parsed.images.shape
    if batch >= 0:
        return (batch, batch, batch)
    profile = parsed.builder.create_optimization_profile()
    profile.set_shape(name, *((size, *rest) for size in options.batch_range))
    config.add_optimization_profile(profile)
    return options.batch_range


def _add_shapes(parsed: ParsedNetwork, config: Any, shapes: Mapping[str, Shapes]) -> tuple[int, int, int]:
    """A profile of any inputs; returned is the smallest, best and largest batch of the first one."""
    profile = parsed.builder.create_optimization_profile()
    for tensor in parsed.inputs:
        if any(size < 0 for size in tensor.shape):
            profile.set_shape(tensor.name, *shapes[tensor.name])
    if any(size < 0 for tensor in parsed.inputs for size in tensor.shape):
        config.add_optimization_profile(profile)
    first = parsed.inputs[0]
    sizes = shapes.get(first.name, (first.shape,) * 3)
    smallest, best, largest = (shape[0] if shape else 1 for shape in sizes)
    return smallest, best, largest


@contextmanager
def _open_plan(plan: Path) -> Iterator[_PlanWriter]:
    """A writer to `plan`; after an error the file is removed."""
    try:
        with plan.open("wb") as file:
            yield _PlanWriter(file)
    except BaseException:
        plan.unlink(missing_ok=True)
        raise


def _build(
    backend: Backend,
    parsed: ParsedNetwork,
    config: Any,
    writer: _PlanWriter,
    progress: Progress,
) -> bool:
    """Let the library build and hand the plan to `writer`; return False if it failed."""
    cancellation = Cancellation()
    monitor = make_monitor(backend, progress, cancellation)
    config.progress_monitor = monitor
    stream = _make_stream(backend, writer)

    def build() -> bool:
        return bool(parsed.builder.build_serialized_network_to_stream(parsed.network, config, stream))

    done = run_cancellable(build, cancellation)
    # The library itself only says that it failed, not what stopped it.
    if monitor.error is not None:
        raise monitor.error
    if writer.error is not None:
        raise writer.error
    return done and writer.size > 0


def _make_stream(backend: Backend, writer: _PlanWriter) -> Any:
    base: Any = backend.module.IStreamWriter

    class Stream(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def write(self, data: bytes) -> int:
            return writer.write(data)

    return Stream()
