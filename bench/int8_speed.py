"""Speed of the INT8 graphs in ONNX Runtime on the CPU: fp32, ONNX Runtime's own Q/DQ, ours; interleaved rounds.

python bench/int8_speed.py --arch A0 --size 64 -o bench/results
python bench/int8_speed.py --arch resnet50 --size 64 -o bench/results     # is the baseline held back?
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from int8_setup import fuse_seeded, open_session, write_record
from int8_tools import quantize_onnxruntime

from repvgg_deploy.benchmark.baseline_graphs import BaselineFloats, BaselineIntegers, find_ranges, to_baseline_onnx
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.repvgg import FloatLayers, GraphOptions, to_onnx
from repvgg_deploy.nets.baselines import find_baseline
from repvgg_deploy.nets.seeding import seeded_baseline
from repvgg_deploy.quantization import load_recipe, quantize
from repvgg_deploy.quantization.qdq import to_qdq_onnx
from repvgg_deploy.runtime.saturation import saturates_here


def write_models(arch: str, size: int, folder: Path) -> dict[str, Path]:
    """The graphs of a seeded net; speed does not depend on the weights."""
    images = np.random.default_rng(0).standard_normal((32, 3, size, size)).astype(np.float32)
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "onnxruntime", "repvgg-deploy")}
    options = GraphOptions(size, size)
    baseline = find_baseline(arch)
    if baseline is None:
        net = fuse_seeded(arch)
        fp32 = to_onnx(net, FloatLayers(), options, {})
        int8 = to_qdq_onnx(quantize(net, [images], load_recipe("fast")), options, {})
    else:
        other = seeded_baseline(baseline)
        fp32 = to_baseline_onnx(other, BaselineFloats(), options, {})
        int8 = to_baseline_onnx(other, BaselineIntegers(find_ranges(other, images)), options, {})
    write_graph(fp32, paths["fp32"])
    quantize_onnxruntime(paths["fp32"], "minmax", True, images, paths["onnxruntime"])
    write_graph(int8, paths["repvgg-deploy"])
    return paths


# ONNX Runtime's threads spin for a while after a run, and would take the cores from the next session's.
SPINNING_SECONDS = 0.08


def time_once(session: ort.InferenceSession, images: np.ndarray, runs: int) -> float:
    """Milliseconds a run, over `runs` of them, when the other sessions' threads have come to rest."""
    time.sleep(SPINNING_SECONDS)
    session.run(None, {"images": images})
    start = time.perf_counter()
    for _ in range(runs):
        session.run(None, {"images": images})
    return (time.perf_counter() - start) * 1000 / runs


def main() -> None:
    """Time the graphs in turn; print and record medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", default="A0")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-note", help="what the CPU's name does not tell, for the record")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_models(arguments.arch, arguments.size, Path(scratch))
        sessions = {name: open_session(str(path)) for name, path in paths.items()}
        for batch in arguments.batches:
            shape = (batch, 3, arguments.size, arguments.size)
            images = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
            times: dict[str, list[float]] = {name: [] for name in sessions}
            for number in range(arguments.rounds + 2):
                for name, session in sessions.items():
                    elapsed = time_once(session, images, max(1, 16 // batch))
                    # The first two rounds warm up.
                    times[name] += [elapsed] if number >= 2 else []
            row = {name: round(statistics.median(values), 3) for name, values in times.items()}
            speedup = {name: round(row["fp32"] / value, 2) for name, value in row.items()}
            results.append({"arch": arguments.arch, "size": arguments.size, "batch": batch, "ms": row, "x": speedup})
            print(results[-1], flush=True)
    what = f"int8-speed-{arguments.arch}-{arguments.size}{'-without-vnni' if saturates_here() else ''}"
    path = write_record(arguments.output, what, results, cpu_note=arguments.cpu_note, rounds=arguments.rounds)
    print(f"written {path}")


if __name__ == "__main__":
    main()
