"""The time of every layer, as ONNX Runtime's own profiler sees it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from repvgg_deploy.errors import DeployError
from repvgg_deploy.roofline import ELEMENT_BYTES, Cost, graph_costs
from repvgg_deploy.runners.onnx_runner import OnnxRunner, import_onnxruntime

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_SUFFIX = "_kernel_time"
_COSTLY = ("Conv", "FusedConv", "QLinearConv", "Gemm", "QGemm", "MatMul")


@dataclass(frozen=True)
class LayerTime:
    """One node of the graph as ONNX Runtime runs it: the median time, its share of all, and what it has to do.

    `cost` is None for what is no convolution or linear layer.
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
        DeployError: the file is no graph of a fixed input size.
    """
    if path.suffix != ".onnx":
        raise DeployError(f"{path} is no ONNX graph", "--profile is for graphs: `export` writes one")
    plain = OnnxRunner(path, quick_start=True)
    dtype = _TYPES.get(plain.input_type)
    if dtype is None or None in plain.input_shape[1:]:
        raise DeployError(f"{path} takes {plain.input_type} of {plain.input_shape}", "export it with a fixed size")
    if plain.batch not in (None, batch):
        raise DeployError(f"{path} takes batches of {plain.batch}, not {batch}", "export it without --batch")
    shape = (batch, *(size or 0 for size in plain.input_shape[1:]))
    images = np.random.default_rng(0).random(shape, dtype=np.float32).astype(dtype)
    events = _run_profiled(path, plain.input_name, images, threads, seconds)
    precision = plain.precision if plain.precision in ELEMENT_BYTES else "fp32"
    model = onnx.load(path, load_external_data=False)
    costs = _with_fused_names(model, graph_costs(model, batch, precision))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        times[event["name"].removesuffix(_SUFFIX), event["args"]["op_name"]].append(event["dur"] / 1e3)
    medians = {key: statistics.median(values) for key, values in times.items()}
    total = sum(medians.values())
    layers = [
        LayerTime(name, operator, ms, ms / total, _cost_of(name, costs) if operator in _COSTLY else None)
        for (name, operator), ms in medians.items()
    ]
    layers.sort(key=lambda layer: -layer.milliseconds)
    runs = max(map(len, times.values()))
    return Profile(path.name, plain.backend, plain.backend_version, batch, runs, tuple(layers))


def _run_profiled(path: Path, name: str, images: Any, threads: int, seconds: float) -> list[dict[str, Any]]:
    """The profiler's events of all nodes, without those of the warm-up."""
    runtime = import_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        warmup = 2
        for _ in range(warmup):
            session.run(None, {name: images})
        end = time.perf_counter() + seconds
        runs = 0
        while runs < 5 or time.perf_counter() < end:
            session.run(None, {name: images})
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)]
    return nodes[len(nodes) * warmup // (runs + warmup) :]


def _with_fused_names(model: onnx.ModelProto, costs: dict[str, Cost]) -> dict[str, Cost]:
    """`costs`, also under the names of the additions and ReLUs behind a layer: the fused node has the last one's."""
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
