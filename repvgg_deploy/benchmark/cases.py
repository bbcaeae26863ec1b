"""What a benchmark runs: a file or an architecture, opened on one backend in one precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import onnx
import torch

from repvgg_deploy.artifacts import Precision, PreprocessingOptions
from repvgg_deploy.benchmark.graphs import NamedNet, write_net
from repvgg_deploy.benchmark.measure import Label, Subject
from repvgg_deploy.benchmark.names import BACKENDS, ENGINES, PROVIDERS
from repvgg_deploy.benchmark.roofline import ELEMENT_BYTES, Cost, graph_costs, net_costs, total_cost
from repvgg_deploy.benchmark.workloads import BlockingSubject, StreamSubject
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.baselines import find_baseline, fold_batch_norms
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.preprocessing import choose_preprocessing
from repvgg_deploy.nets.seeding import seeded_baseline, seeded_inputs, seeded_repvgg
from repvgg_deploy.runtime.model import is_engine, is_onnx
from repvgg_deploy.runtime.onnxruntime import NUMPY_TYPES, OnnxRunner, import_onnxruntime
from repvgg_deploy.runtime.torch import TorchEvents, TorchLane, TorchOptions, TorchPrecision, TorchRunner

if TYPE_CHECKING:
    from repvgg_deploy.engine.options import BuildOptions


@dataclass(frozen=True)
class Entry:
    """What is to be opened.

    Attributes:
        model: a checkpoint, an ONNX graph, an engine, or the name of an architecture, which gets seeded weights.
        backend: one of `BACKENDS`; None for the natural one of the file, on a GPU where the library finds one.
        precision: fp32, fp16, int8; on torch also bf16, on torch and engines tf32. None for the file's own, else fp32.
        form: `deploy`, or `training` for a RepVGG with all its branches.
        mode, channels_last: see `TorchOptions`.
        threads: of the CPU; 0 for the backend's choice.
        transfers: whether the copies to and from a GPU are part of a query.
        streams: of an engine, or of torch on a GPU.
        size: of the input in pixels, for an architecture.
        build: the options of the plan that an engine's baseline is built like; see `comparable_options`.
    """

    model: str
    backend: str | None = None
    precision: str | None = None
    form: str = "deploy"
    mode: str = "eager"
    channels_last: bool = False
    threads: int = 0
    transfers: bool = False
    streams: int = 1
    size: int | None = None
    build: BuildOptions | None = None

    @property
    def is_file(self) -> bool:
        """Whether `model` is a file that is there."""
        return Path(self.model).is_file()


@dataclass
class Contestant:
    """An opened model.

    Attributes:
        label: with batch 0.
        at_batch: the subject for one batch size.
        build: of an engine from a file, and of what is built to be compared with it.
        cost: of one batch; None where nothing tells what the model computes.
        parameters, top1: of the architecture, the accuracy as published; None where it has no card.
    """

    label: Label
    at_batch: Callable[[int], Subject]
    build: BuildOptions | None = None
    cost: Callable[[int], Cost] | None = None
    parameters: int | None = None
    top1: float | None = None
    cleanup: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Give back what it holds."""
        self.cleanup.close()


def open_entry(entry: Entry, folder: Path) -> Contestant:
    """The model of an entry, ready to run; what has to be exported or built for that goes to `folder`.

    Raises:
        DeployError: there is no such file or architecture, or the backend cannot run it here.
    """
    if entry.backend is not None and entry.backend not in BACKENDS:
        raise DeployError(f"no backend is called {entry.backend!r}", f"one of: {', '.join(BACKENDS)}")
    path = Path(entry.model)
    if entry.is_file and (is_engine(path) or is_onnx(path)):
        if entry.form == "training":
            raise DeployError(f"{path} runs as it was exported", "--form training is for checkpoints and architectures")
        return _open_plan(entry, path, path.name) if is_engine(path) else _open_graph(entry, path, path.name)
    net = _find_net(entry)
    backend = entry.backend or ("torch-cuda" if torch.cuda.is_available() else "torch-cpu")
    entry = replace(entry, backend=backend, precision=entry.precision or "fp32")
    if backend.startswith("torch-"):
        return _open_torch(entry, net)
    return _open_exported(entry, net, folder)


def _find_net(entry: Entry) -> NamedNet:
    """The net of a checkpoint or of an architecture, in the form that the entry asks for."""
    path = Path(entry.model)
    if entry.is_file:
        checkpoint = load_checkpoint(path)
        name, net = path.name, build(checkpoint)
        size, top1 = entry.size or choose_preprocessing(checkpoint.spec, PreprocessingOptions()).height, None
    else:
        baseline = find_baseline(entry.model)
        if baseline is not None:
            if entry.form != "deploy":
                raise DeployError(f"{baseline.name} has one form only", "the training form is for RepVGGs")
            folded = fold_batch_norms(seeded_baseline(baseline))
            return NamedNet(baseline.name, folded, entry.size or baseline.preprocessing.height, baseline.top1)
        if path.suffix or "/" in entry.model:
            raise DeployError(
                f"there is no file {entry.model}", "give a checkpoint, an ONNX graph, an engine, or a name"
            )
        card = find_card(entry.model)
        name, net = card.name, seeded_repvgg(card)
        size, top1 = entry.size or card.preprocessing.height, card.published.top1
    if entry.form == "deploy":
        net = fuse(net, torch.float32)
    elif net.spec.form == "deploy":
        raise DeployError(f"{entry.model} is fused already, its training form is gone", "leave --form out")
    return NamedNet(name, net, size, top1)


def _label(entry: Entry, name: str, version: str, size: Sequence[int], mode: str = "") -> Label:
    height, width = size
    precision = cast(str, entry.precision)
    return Label(name, cast(str, entry.backend), version, precision, 0, entry.form, mode, (height, width))


def _require_precision(entry: Entry, path: Path, found: str) -> str:
    """The precision of a file; what the entry says where the file does not.

    Raises:
        DeployError: they say different things.
    """
    if entry.precision is None or entry.precision == found:
        return found
    if found != "unknown":
        raise DeployError(f"{path} is {found}, not {entry.precision}", "leave --precision out")
    if entry.precision not in ELEMENT_BYTES:
        raise DeployError(f"there is no precision {entry.precision!r}", f"one of: {', '.join(ELEMENT_BYTES)}")
    return entry.precision


def _open_torch(entry: Entry, named: NamedNet) -> Contestant:
    precision = cast(str, entry.precision)
    if precision not in get_args(TorchPrecision):
        raise DeployError(f"torch does not run {precision} here", f"one of: {', '.join(get_args(TorchPrecision))}")
    device = cast(str, entry.backend).removeprefix("torch-")
    options = TorchOptions(device, cast(TorchPrecision, precision), cast(Any, entry.mode), entry.channels_last)
    if device == "cpu" and entry.threads:
        torch.set_num_threads(entry.threads)
    runner = TorchRunner(named.net, options)
    mode = options.label + _streams_and_copies(entry)
    label = _label(entry, named.name, runner.backend_version, (named.size, named.size), mode)

    def at_batch(batch: int) -> Subject:
        images = seeded_inputs((batch, named.in_channels, named.size, named.size))
        here = replace(label, batch=batch)
        if device == "cuda":
            lanes = [TorchLane(runner, images) for _ in range(entry.streams)]
            return StreamSubject(here, lanes, TorchEvents(), entry.transfers)
        placed = runner.place(images)
        return BlockingSubject(here, lambda: runner.forward(placed))

    shape = (named.in_channels, named.size, named.size)
    # A CPU's copy of the net; its tensors are not touched.
    cost = lambda batch: total_cost(net_costs(named.net, batch, shape, precision))  # noqa: E731
    return Contestant(label, at_batch, None, cost, named.parameters, named.top1)


def _open_exported(entry: Entry, named: NamedNet, folder: Path) -> Contestant:
    """Through the same export as every other graph, into `folder`."""
    precision, for_engine = cast(str, entry.precision), entry.backend in ENGINES
    # TF32 is a way to run a float32 graph.
    stored = "fp32" if for_engine and precision == "tf32" else precision
    if stored not in [str(known) for known in Precision]:
        raise DeployError(f"a graph has no precision {precision!r}", "fp32, fp16 or int8; tf32 for an engine")
    path = write_net(named, Precision(stored), entry.form, folder, for_engine)
    if for_engine:
        plan = _build_plan(entry, path, folder)
        opened = replace(_open_plan(entry, plan, named.name), build=entry.build, cost=_graph_cost(path, precision))
    else:
        opened = _open_graph(entry, path, named.name)
    return replace(opened, parameters=named.parameters, top1=named.top1)


def _build_plan(entry: Entry, graph: Path, folder: Path) -> Path:
    from repvgg_deploy.engine import BuildOptions, Unavailable, build_engine, find_backend
    from repvgg_deploy.files import stage_files

    backend = find_backend(cast(str, entry.backend))
    if isinstance(backend, Unavailable):
        raise DeployError(backend.reason, backend.hint)
    options = replace(entry.build or BuildOptions(), tf32=entry.precision == "tf32")
    with stage_files(folder) as staging:
        built = build_engine(graph, backend, options, staging)
    return folder / built.plan.name


def comparable_options(options: BuildOptions) -> BuildOptions:
    """How a net is built to be compared with an engine that was built with `options`: alike, and ready to run."""
    return replace(options, refittable=options.needs_refit, strip_weights=False, timing_cache=True)


def _open_graph(entry: Entry, path: Path, name: str) -> Contestant:
    backend = entry.backend or _natural_provider()
    if backend not in PROVIDERS:
        raise DeployError(f"{path} is an ONNX graph, and {backend} does not run it", f"one of: {', '.join(PROVIDERS)}")
    runner = OnnxRunner(path, PROVIDERS[backend], entry.threads)
    known = replace(entry, backend=backend, precision=_require_precision(entry, path, runner.precision))
    dtype = NUMPY_TYPES.get(runner.input_type)
    if dtype is None or None in runner.input_shape[1:]:
        raise DeployError(f"{path} takes {runner.input_type} of {runner.input_shape}", "export it with a fixed size")
    shape = cast("tuple[int, ...]", runner.input_shape[1:])
    # On a GPU ONNX Runtime copies from and to the host within the call.
    mode = "" if backend == "onnxruntime-cpu" else "with copies"
    if runner.saturating:
        # Its speed is that of a right one, its outputs are not: whoever reads the figure should know.
        mode = "sums may saturate"
    label = _label(known, name, runner.backend_version, _pixels(shape, dtype), mode)

    def at_batch(batch: int) -> Subject:
        if runner.batch not in (None, batch):
            raise DeployError(f"{path} takes batches of {runner.batch}, not {batch}", "export it without --batch")
        images = seeded_inputs((batch, *shape), dtype)
        return BlockingSubject(replace(label, batch=batch), lambda: runner.run(images))

    return Contestant(label, at_batch, None, _graph_cost(path, label.precision))


def _pixels(shape: Sequence[int], dtype: Any) -> Sequence[int]:
    """Height and width of an input without the batch: (H, W, C) for bytes, else (C, H, W)."""
    return shape[:2] if np.dtype(dtype) == np.uint8 else shape[1:]


def _natural_provider() -> str:
    available = import_onnxruntime().get_available_providers()
    return "onnxruntime-cuda" if PROVIDERS["onnxruntime-cuda"] in available else "onnxruntime-cpu"


def _graph_cost(path: Path, precision: str) -> Callable[[int], Cost]:
    """What a graph computes, by the batch."""
    model = onnx.load(path, load_external_data=False)
    for item in model.graph.initializer:
        # Shapes are all that is needed.
        item.ClearField("raw_data")
    known = precision if precision in ELEMENT_BYTES else "fp32"
    return lambda batch: total_cost(graph_costs(model, batch, known))


def _streams_and_copies(entry: Entry) -> str:
    """What a label says of both, behind a mode."""
    streams = "" if entry.streams == 1 else f", {entry.streams} streams"
    return streams + (", with copies" if entry.transfers else "")


def _open_plan(entry: Entry, path: Path, name: str) -> Contestant:
    from repvgg_deploy.engine.runner import open_engine

    if entry.backend not in (None, *ENGINES):
        raise DeployError(f"{path} is an engine, and {entry.backend} does not run it", "leave --backend out")
    runner = open_engine(path, backend=entry.backend, streams=entry.streams)
    cleanup = ExitStack()
    cleanup.callback(runner.close)
    known = replace(entry, backend=runner.backend, precision=_require_precision(entry, path, runner.precision))
    size, mode = _pixels(runner.input.shape[1:], runner.input.dtype), _streams_and_copies(entry).removeprefix(", ")
    label = _label(known, name, runner.backend_version, size, mode)
    build = None
    if runner.options is not None:
        # A graph with a fixed batch has a profile of its own, whatever range the build was asked for.
        build = replace(comparable_options(runner.options), batch_range=runner.profile)

    def at_batch(batch: int) -> Subject:
        images = seeded_inputs((batch, *runner.input.shape[1:]), np.dtype(runner.input.dtype))
        lanes = runner.batch_lanes(images)
        captured = runner.cuda.has_graphs and not any(lane.without_graph for lane in lanes)
        notes = [label.mode, "" if captured else "no CUDA graph"]
        here = replace(label, batch=batch, mode=", ".join(filter(None, notes)))
        return StreamSubject(here, lanes, runner.cuda, entry.transfers)

    return Contestant(label, at_batch, build, cleanup=cleanup)
