"""How long an engine build takes, where the time goes, and what memory it needs; no GPU is needed for TensorRT-RTX.

    python bench/engine_build.py A0 B1 B3 -o bench/results

Every build runs in a process of its own: first with an empty timing cache, then with what the first one left.
The graphs have random weights, which a build does not depend on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CACHE = ("cold", "warm")


def main() -> None:
    """Parse the arguments, measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*", default=["A0", "B1"], help="architectures (default: A0 B1)")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--repeats", type=int, default=3, help="builds of each kind; the median is told")
    parser.add_argument("-o", "--output", type=Path, help="folder of the record")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, card, graph = arguments.step
        _run_step(step, card, graph, arguments.backend, arguments.precision)
        return
    results = [row for card in arguments.cards for row in _measure(card, arguments)]
    print("card   cache  total s  parser s  builder s  writing s  adapter %  peak MB")
    for row in results:
        print(
            f"{row['card']:6s} {row['cache']:5s}  {row['total_s']:7.2f}  {row['parser_s']:8.2f}"
            f"  {row['builder_s']:9.2f}  {row['writing_s']:9.2f}  {row['adapter_percent']:9.2f}"
            f"  {row['peak_bytes'] / 1e6:7.0f}"
        )
    if arguments.output is not None:
        _write(arguments, results)


def _measure(card: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {cache: [] for cache in CACHE}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _call("graph", card, folder / "net.onnx", arguments, folder / "none")
        for number in range(arguments.repeats):
            for cache in CACHE:
                runs[cache].append(_call("build", card, folder / "net.onnx", arguments, folder / f"cache{number}"))
    return [{"card": card, "cache": cache, **_median(runs[cache])} for cache in CACHE]


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(runs, key=lambda run: run["total_s"])[len(runs) // 2]


def _call(step: str, card: str, graph: Path, arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", step, card, str(graph)]
    command += ["--backend", arguments.backend, "--precision", arguments.precision]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


def _run_step(step: str, card: str, graph: str, backend: str, precision: str) -> None:
    if step == "graph":
        _write_graph(card, Path(graph), precision)
        print("{}")
    else:
        print(json.dumps(_build(Path(graph), backend)))


def _write_graph(card: str, path: Path, precision: str) -> None:
    import numpy as np

    from repvgg_deploy.graphs.builder import write_graph
    from repvgg_deploy.graphs.layers import FloatLayers
    from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
    from repvgg_deploy.nets.cards import find_card
    from repvgg_deploy.nets.repvgg import RepVGG

    layers = FloatLayers(np.dtype(np.float16 if precision == "fp16" else np.float32))
    net = RepVGG(find_card(card).spec().fused()).eval()
    write_graph(to_onnx(net, layers, GraphOptions(224, 224), {}), path)


def _build(graph: Path, name: str) -> dict[str, Any]:
    from repvgg_deploy.engine import Backend, BuildOptions, build_engine, find_backend

    backend = find_backend(name)
    if not isinstance(backend, Backend):
        raise SystemExit(f"{backend.reason}; {backend.hint}")
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        start = time.perf_counter()
        side = build_engine(graph, backend, BuildOptions(), Path(folder)).side
        total = time.perf_counter() - start
    seconds = side.seconds
    outside = total - seconds["parser"] - seconds["builder"] - seconds["writing"]
    return {
        "total_s": round(total, 4),
        "parser_s": round(seconds["parser"], 4),
        "builder_s": round(seconds["builder"], 4),
        "writing_s": round(seconds["writing"], 4),
        "adapter_percent": round(100 * outside / total, 3),
        "plan_bytes": side.bytes,
        # Linux counts in KiB.
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "backend_version": backend.version,
    }


def _write(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    version = results[0]["backend_version"]
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    machine = {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.system()}
    record = {
        "what": "engine build",
        "machine": machine,
        "date": day,
        "backend": arguments.backend,
        "backend_version": version,
        "precision": arguments.precision,
        "batch_range": [1, 32, 256],
        "repeats": arguments.repeats,
        "results": [{key: value for key, value in row.items() if key != "backend_version"} for row in results],
    }
    path = arguments.output / f"cpu-{arguments.backend}-{version}-{day}-engine-build-{arguments.precision}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
