"""The time of every layer, as the backend's own profiler sees it: ONNX Runtime's, or TensorRT's."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from repvgg_deploy.benchmark.workloads import require_numbers
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.files.kinds import file_kind
from repvgg_deploy.files.staging import scratch_folder
from repvgg_deploy.graphs.cost import ELEMENT_BYTES, Cost, graph_costs
from repvgg_deploy.graphs.reading import read_graph
from repvgg_deploy.nets.seeding import seeded_inputs
from repvgg_deploy.runtime.failures import first_line, is_graph_failure
from repvgg_deploy.runtime.loops import ending_runs, find_loops
from repvgg_deploy.runtime.onnxruntime import NUMPY_TYPES, OnnxRunner, import_onnxruntime

_SUFFIX = "_kernel_time"
_COSTLY = ("Conv", "FusedConv", "QLinearConv", "Gemm", "QGemm", "MatMul")


LayerTimes = dict[tuple[str, str], list[float]]
"""Milliseconds of every run by name and operator; TensorRT does not report the operator."""


@dataclass(frozen=True)
class LayerTime:
    """One layer as the backend runs it: the median time, its share of all, and what it has to do.

    `cost` is None unless the layer is a convolution or a linear layer.
    """

    name: str
    operator: str
    milliseconds: float
    share: float
    cost: Cost | None


@dataclass(frozen=True)
class Profile:
    """All layers of a graph, the slowest first."""

    model: str
    backend: str
    backend_version: str
    batch: int
    runs: int
    layers: tuple[LayerTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def profile_graph(path: Path, batch: int, threads: int = 0, seconds: float = 3.0) -> Profile:
    """Run an ONNX graph for so long on the CPU with the profiler on.

    The profiler itself takes time, so the sum is more than an ordinary run; the shares are what counts.

    Raises:
        DeployError: the file is not a graph with a fixed input size.
        VerificationError: the graph gives NaN or Inf.
    """
    if file_kind(path) != "onnx":
        raise DeployError(f"{path} is not an ONNX graph", "--profile is for graphs and engines: `export` writes them")
    plain = OnnxRunner(path, quick_start=True)
    dtype = NUMPY_TYPES.get(plain.input_type)
    if dtype is None or None in plain.input_shape[1:]:
        raise DeployError(f"{path} takes {plain.input_type} of {plain.input_shape}", "export it with a fixed size")
    if plain.batch not in (None, batch):
        raise DeployError(f"{path} takes batches of {plain.batch}, not {batch}", "export it without --batch")
    shape = (batch, *(size or 0 for size in plain.input_shape[1:]))
    images = seeded_inputs(shape, dtype)
    events = _run_profiled(path, plain.input_name, images, threads, seconds)
    precision = plain.precision if plain.precision in ELEMENT_BYTES else "fp32"
    model = read_graph(path)
    costs = _with_fused_names(model, graph_costs(model, batch, precision))
    times: LayerTimes = defaultdict(list)
    for event in events:
        times[event["name"].removesuffix(_SUFFIX), event["args"]["op_name"]].append(event["dur"] / 1e3)
    runs = max(map(len, times.values()))
    return Profile(path.name, plain.backend, plain.backend_version, batch, runs, _rank(times, costs))


def _rank(times: LayerTimes, costs: dict[str, Cost]) -> tuple[LayerTime, ...]:
    medians = {key: statistics.median(values) for key, values in times.items()}
    total = sum(medians.values())
    layers = [
        LayerTime(name, operator, ms, ms / total, _cost_of(name, costs) if operator in _COSTLY else None)
        for (name, operator), ms in medians.items()
    ]
    return tuple(sorted(layers, key=lambda layer: -layer.milliseconds))


def profile_engine(path: Path, batch: int, seconds: float = 3.0) -> Profile:
    """Run an engine for so long, without CUDA graphs, with the library's layer profiler attached.

    The GPU is waited for after every run, so the sum is more than an ordinary run; the shares are what counts. Fused
    layers have the names that the library gives them.

    Raises:
        DeployError: the engine cannot run here.
        VerificationError: the engine gives NaN or Inf.
    """
    from repvgg_deploy.engine.loading import load_plan
    from repvgg_deploy.engine.runner import EngineRunner

    loaded = load_plan(path)
    runner = EngineRunner(loaded, graphs=False)
    try:
        shape = (batch, *runner.input.shape[1:])
        images = seeded_inputs(shape, np.dtype(runner.input.dtype))
        stream = runner.batch_streams(images)[0]
        require_numbers(path.name, stream.outputs())
        times: LayerTimes = defaultdict(list)
        # The context calls it back after every run; it must live as long.
        runner.streams[0].context.profiler = profiler = make_layer_profiler(loaded.backend.module, times)
        warmup, runs, end = 2, 0, time.perf_counter() + seconds
        while runs < 5 + warmup or time.perf_counter() < end:
            stream.enqueue()
            stream.synchronize()
            runs += 1
        del profiler
    finally:
        runner.close()
    counted = {key: values[len(values) * warmup // runs :] for key, values in times.items()}
    return Profile(path.name, runner.backend, runner.backend_version, batch, runs - warmup, _rank(counted, {}))


def make_layer_profiler(module: Any, times: LayerTimes) -> Any:
    """An `IProfiler` of TensorRT (or TensorRT-RTX) that adds the milliseconds of each layer to `times`."""
    base: Any = module.IProfiler

    class Profiler(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault((layer_name, ""), []).append(float(ms))

    return Profiler()


def _run_profiled(path: Path, name: str, images: Any, threads: int, seconds: float) -> list[dict[str, Any]]:
    """The profiler's events of all nodes, without those of the warm-up."""
    runtime = import_onnxruntime()
    with scratch_folder() as folder:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        warmup, runs = 2, 0
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            first = runtime.RunOptions()
            first.log_severity_level = 4
            with ending_runs(first, path, find_loops(path)):
                require_numbers(path.name, session.run(None, {name: images}, first))
            for _ in range(warmup - 1):
                session.run(None, {name: images})
            end = time.perf_counter() + seconds
            while runs < 5 or time.perf_counter() < end:
                session.run(None, {name: images})
                runs += 1
        except Exception as error:
            if not is_graph_failure(error):
                raise
            raise GraphError(f"{path} does not run: {first_line(error)}", "`inspect` shows what it takes") from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    # Every run has the same nodes: the warm-up's share of the runs is its share of the events.
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)]
    return nodes[len(nodes) * warmup // (runs + warmup) :]


def _with_fused_names(model: onnx.ModelProto, costs: dict[str, Cost]) -> dict[str, Cost]:
    """`costs`, also under the names of the additions and ReLUs after a layer: the fused node has the last one's."""
    by_tensor = {node.output[0]: costs[node.name] for node in model.graph.node if node.name in costs}
    named = dict(costs)
    for node in model.graph.node:
        behind = next((by_tensor[name] for name in node.input if name in by_tensor), None)
        if node.op_type in ("Add", "Relu") and behind is not None:
            named[node.name] = by_tensor[node.output[0]] = behind
    return named


def _cost_of(name: str, costs: dict[str, Cost]) -> Cost | None:
    """The cost of the node that ONNX Runtime has made another one of: it adds endings such as `_nchwc`, `_token_12`."""
    if name in costs:
        return costs[name]
    fitting = [known for known in costs if name.startswith(known + "_") or name == f"fused {known}"]
    return costs[max(fitting, key=len)] if fitting else None
