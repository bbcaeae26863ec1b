"""Opening what a benchmark runs: exported or built where that is needed, ready for a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch

from repvgg_deploy.artifacts import Array, Precision, PreprocessingOptions
from repvgg_deploy.benchmark.cases import Case, OpenedCase
from repvgg_deploy.benchmark.graphs import NamedNet, write_net
from repvgg_deploy.benchmark.measure import Label, Workload
from repvgg_deploy.benchmark.names import BACKENDS, ENGINES, PROVIDERS
from repvgg_deploy.benchmark.workloads import BlockingWorkload, StreamWorkload
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import file_kind
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.cost import ELEMENT_BYTES, Cost, graph_costs, net_costs, total_cost
from repvgg_deploy.graphs.reading import read_graph
from repvgg_deploy.nets.baselines import fold_batch_norms
from repvgg_deploy.nets.cards import find_baseline, find_card
from repvgg_deploy.nets.preprocessing import choose_preprocessing
from repvgg_deploy.nets.seeding import seeded_baseline, seeded_inputs, seeded_repvgg
from repvgg_deploy.runtime.onnxruntime import NUMPY_TYPES, BoundRun, OnnxRunner, import_onnxruntime
from repvgg_deploy.runtime.torch import TorchEvents, TorchOptions, TorchPrecision, TorchRunner, TorchStream

if TYPE_CHECKING:
    from repvgg_deploy.engine.options import BuildOptions


def open_case(case: Case, folder: Path) -> OpenedCase:
    """The model of a case, ready to run; what has to be exported or built for that goes to `folder`.

    Raises:
        DeployError: there is no such file or architecture, or the backend cannot run it here.
    """
    if case.backend is not None and case.backend not in BACKENDS:
        raise DeployError(f"no backend is called {case.backend!r}", f"one of: {', '.join(BACKENDS)}")
    path = Path(case.model)
    if case.is_file and (file_kind(path) != "checkpoint"):
        if case.form == "training":
            raise DeployError(f"{path} runs as it was exported", "--form training is for checkpoints and architectures")
        return _open_plan(case, path, path.name) if file_kind(path) == "engine" else _open_graph(case, path, path.name)
    net = _find_net(case)
    backend = case.backend or ("torch-cuda" if torch.cuda.is_available() else "torch-cpu")
    case = replace(case, backend=backend, precision=case.precision or "fp32")
    if backend.startswith("torch-"):
        return _open_torch(case, net)
    return _open_exported(case, net, folder)


def _find_net(case: Case) -> NamedNet:
    """The net of a checkpoint or of an architecture, in the form that the case asks for."""
    path = Path(case.model)
    if case.is_file:
        checkpoint = load_checkpoint(path)
        name, net = path.name, build(checkpoint)
        size, top1 = case.size or choose_preprocessing(checkpoint.spec, PreprocessingOptions()).height, None
    else:
        baseline = find_baseline(case.model)
        if baseline is not None:
            if case.form != "deploy":
                raise DeployError(f"{baseline.name} has one form only", "the training form is for RepVGGs")
            folded = fold_batch_norms(seeded_baseline(baseline))
            return NamedNet(baseline.name, folded, case.size or baseline.preprocessing.height, baseline.published.top1)
        if path.suffix or "/" in case.model:
            raise DeployError(
                f"there is no file {case.model}", "give a checkpoint, an ONNX graph, an engine, or a name"
            )
        card = find_card(case.model)
        name, net = card.name, seeded_repvgg(card)
        size, top1 = case.size or card.preprocessing.height, card.published.top1
    if case.form == "deploy":
        net = fuse(net, torch.float32)
    elif net.spec.form == "deploy":
        raise DeployError(f"{case.model} is already fused, so it has no training form", "leave --form out")
    return NamedNet(name, net, size, top1)


def _label(case: Case, name: str, version: str, size: Sequence[int], mode: str = "") -> Label:
    height, width = size
    precision = cast(str, case.precision)
    return Label(name, cast(str, case.backend), version, precision, 0, case.form, mode, (height, width))


def _require_precision(case: Case, path: Path, found: str) -> str:
    """The precision of a file; what the case says where the file does not.

    Raises:
        DeployError: they say different things.
    """
    if case.precision is None or case.precision == found:
        return found
    if found != "unknown":
        raise DeployError(f"{path} is {found}, not {case.precision}", "leave --precision out")
    if case.precision not in ELEMENT_BYTES:
        raise DeployError(f"there is no precision {case.precision!r}", f"one of: {', '.join(ELEMENT_BYTES)}")
    return case.precision


def _open_torch(case: Case, named: NamedNet) -> OpenedCase:
    precision = cast(str, case.precision)
    if precision not in get_args(TorchPrecision):
        raise DeployError(f"torch does not run {precision} here", f"one of: {', '.join(get_args(TorchPrecision))}")
    device = cast(str, case.backend).removeprefix("torch-")
    channels_last = case.channels_last
    if channels_last is None:
        channels_last = device == "cuda" and precision in ("fp16", "bf16")
    options = TorchOptions(device, cast(TorchPrecision, precision), cast(Any, case.mode), channels_last)
    if device == "cpu" and case.threads:
        torch.set_num_threads(case.threads)
    runner = TorchRunner(named.net, options)
    mode = options.label + _streams_and_copies(case)
    label = _label(case, named.name, runner.backend_version, (named.size, named.size), mode)

    def at_batch(batch: int) -> Workload:
        images = seeded_inputs((batch, named.in_channels, named.size, named.size))
        here = replace(label, batch=batch)
        if device == "cuda":
            streams = [TorchStream(runner, images) for _ in range(case.streams)]
            return StreamWorkload(here, streams, TorchEvents(), case.transfers)
        placed = runner.place(images)
        return BlockingWorkload(here, lambda: runner.forward(placed), lambda: [runner.forward(placed).float().numpy()])

    shape = (named.in_channels, named.size, named.size)
    # A CPU's copy of the net; its tensors are not touched.
    cost = lambda batch: total_cost(net_costs(named.net, batch, shape, precision))  # noqa: E731
    return OpenedCase(label, at_batch, None, cost, named.parameters, named.top1)


def _open_exported(case: Case, named: NamedNet, folder: Path) -> OpenedCase:
    """Through the same export as every other graph, into `folder`."""
    precision, for_engine = cast(str, case.precision), case.backend in ENGINES
    # TF32 is a way to run a float32 graph.
    stored = "fp32" if for_engine and precision == "tf32" else precision
    if stored not in [str(known) for known in Precision]:
        raise DeployError(
            f"an ONNX graph cannot run in the precision {precision!r}", "fp32, fp16 or int8; tf32 for an engine"
        )
    path = write_net(named, Precision(stored), case.form, folder, for_engine, case.input_type)
    if for_engine:
        plan = _build_plan(case, path, folder)
        opened = replace(_open_plan(case, plan, named.name), build=case.build, cost=_graph_cost(path, precision))
    else:
        opened = _open_graph(case, path, named.name)
    return replace(opened, parameters=named.parameters, top1=named.top1)


def _build_plan(case: Case, graph: Path, folder: Path) -> Path:
    from repvgg_deploy.engine import BuildOptions, Unavailable, build_engine, find_backend
    from repvgg_deploy.files.staging import stage_files

    backend = find_backend(cast(str, case.backend))
    if isinstance(backend, Unavailable):
        raise DeployError(backend.reason, backend.hint)
    options = replace(case.build or BuildOptions(), tf32=case.precision == "tf32")
    with stage_files(folder, is_result=False) as staging:
        built = build_engine(graph, backend, options, staging)
    return folder / built.plan.name


def comparable_options(options: BuildOptions) -> BuildOptions:
    """How a net is built to be compared with an engine that was built with `options`: alike, and ready to run."""
    return replace(options, refittable=options.needs_refit, strip_weights=False, timing_cache=True)


def _open_graph(case: Case, path: Path, name: str) -> OpenedCase:
    backend = case.backend or _natural_provider()
    if backend not in PROVIDERS:
        raise DeployError(f"{path} is an ONNX graph, which {backend} does not run", f"one of: {', '.join(PROVIDERS)}")
    # With threads that spin, as ONNX Runtime has them by default: what is timed is what its users get.
    runner = OnnxRunner(path, PROVIDERS[backend], case.threads, spinning=True)
    known = replace(case, backend=backend, precision=_require_precision(case, path, runner.precision))
    dtype = NUMPY_TYPES.get(runner.input_type)
    if dtype is None or None in runner.input_shape[1:]:
        raise DeployError(f"{path} takes {runner.input_type} of {runner.input_shape}", "export it with a fixed size")
    shape = cast("tuple[int, ...]", runner.input_shape[1:])
    on_cpu = backend == "onnxruntime-cpu"
    mode = "" if on_cpu else "cuda-graph, channels-last" + _streams_and_copies(replace(case, streams=1))
    if runner.saturating:
        # Its speed is that of a right one, its outputs are not: whoever reads the figure should know.
        mode = "sums may saturate"
    label = _label(known, name, runner.backend_version, _pixels(shape, dtype), mode)
    label = replace(label, input_type=np.dtype(dtype).name)

    def at_batch(batch: int) -> Workload:
        if runner.batch not in (None, batch):
            raise DeployError(f"{path} takes batches of {runner.batch}, not {batch}", "export it without --batch")
        images = seeded_inputs((batch, *shape), dtype)
        here = replace(label, batch=batch)
        if on_cpu:
            return BlockingWorkload(here, lambda: runner.run(images), lambda: runner.run(images).values())
        bound = runner.bind(images)
        with_copies = _with_copies(bound)
        call = with_copies if case.transfers else bound.run
        # Nothing of it waits on a core of the CPU between two turns.
        return BlockingWorkload(here, call, lambda: with_copies().values(), spins=False)

    return OpenedCase(label, at_batch, None, _graph_cost(path, label.precision))


def _with_copies(bound: BoundRun) -> Callable[[], dict[str, Array]]:
    def call() -> dict[str, Array]:
        bound.upload()
        bound.run()
        return bound.download()

    return call


def _pixels(shape: Sequence[int], dtype: Any) -> Sequence[int]:
    """Height and width of an input without the batch: (H, W, C) for bytes, else (C, H, W)."""
    return shape[:2] if np.dtype(dtype) == np.uint8 else shape[1:]


def _natural_provider() -> str:
    available = import_onnxruntime().get_available_providers()
    return "onnxruntime-cuda" if PROVIDERS["onnxruntime-cuda"] in available else "onnxruntime-cpu"


def _graph_cost(path: Path, precision: str) -> Callable[[int], Cost]:
    """What a graph computes, by the batch."""
    model = read_graph(path)
    for item in model.graph.initializer:
        # Shapes are all that is needed.
        item.ClearField("raw_data")
    known = precision if precision in ELEMENT_BYTES else "fp32"
    return lambda batch: total_cost(graph_costs(model, batch, known))


def away_from_the_best_batch(profile: tuple[int, int, int], batch: int) -> tuple[str, ...]:
    """A note where an engine is not run at the batch that its kernels were chosen for."""
    if batch == profile[1]:
        return ()
    return (f"the kernels of the plan were chosen for a batch of {profile[1]}",)


def _streams_and_copies(case: Case) -> str:
    """The part of a label, after the mode, that says both."""
    streams = "" if case.streams == 1 else f", {case.streams} streams"
    return streams + (", with copies" if case.transfers else "")


def _open_plan(case: Case, path: Path, name: str) -> OpenedCase:
    from repvgg_deploy.engine.runner import open_engine

    if case.backend not in (None, *ENGINES):
        raise DeployError(f"{path} is an engine, which {case.backend} does not run", "leave --backend out")
    runner = open_engine(path, backend=case.backend, streams=case.streams)
    cleanup = ExitStack()
    cleanup.callback(runner.close)
    known = replace(case, backend=runner.backend, precision=_require_precision(case, path, runner.precision))
    size, mode = _pixels(runner.input.shape[1:], runner.input.dtype), _streams_and_copies(case).removeprefix(", ")
    label = _label(known, name, runner.backend_version, size, mode)
    warnings = tuple(f"{runner.backend} warns: {warning}" for warning in runner.warnings)
    label = replace(label, input_type=runner.input.dtype, profile=runner.profile, notes=warnings)
    build = None
    if runner.options is not None:
        # A graph with a fixed batch has a profile of its own, whatever range the build was asked for.
        build = replace(comparable_options(runner.options), batch_range=runner.profile)

    def at_batch(batch: int) -> Workload:
        images = seeded_inputs((batch, *runner.input.shape[1:]), np.dtype(runner.input.dtype))
        streams = runner.batch_streams(images)
        captured = runner.cuda.has_graphs and not any(stream.without_graph for stream in streams)
        notes = [label.mode, "" if captured else "no CUDA graph"]
        here = replace(
            label,
            batch=batch,
            mode=", ".join(filter(None, notes)),
            notes=(*label.notes, *away_from_the_best_batch(runner.profile, batch)),
        )
        return StreamWorkload(here, streams, runner.cuda, case.transfers)

    return OpenedCase(label, at_batch, build, cleanup=cleanup)
