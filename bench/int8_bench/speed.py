"""Speed of the INT8 graphs in ONNX Runtime on the CPU: fp32, ONNX Runtime's own Q/DQ, ours; interleaved rounds.

Is the baseline held back? The second command tells.

    python bench/int8.py speed --arch A0 --size 64 -o bench/results
    python bench/int8.py speed --arch resnet50 --size 64 -o bench/results
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort

from int8_bench.options import COUNT, cpu_note_option, output_option
from int8_bench.setup import fuse_seeded, open_session, write_record
from int8_bench.tools import quantize_onnxruntime
from repvgg_deploy.benchmark.baseline_graphs import BaselineFloats, BaselineIntegers, find_ranges, to_baseline_onnx
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.nets.cards import find_baseline
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


def compare_times(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The median milliseconds of each graph, and how many times as fast as fp32 it is.

    The latter is the median of the ratios of the rounds: both of a round meet the same moment of the machine.
    """
    ratios = {
        name: [fp32 / own for fp32, own in zip(times["fp32"], values, strict=True)] for name, values in times.items()
    }
    return {
        "ms": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "x": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
    }


@click.command()
@click.option("--arch", default="A0", show_default=True, help="A card, or a net to compare with.")
@click.option("--size", type=COUNT, default=64, show_default=True, metavar="PX", help="Size of the images.")
@click.option("--batch", "batches", type=COUNT, multiple=True, default=(1, 16), show_default=True, help="Repeatable.")
@click.option("--rounds", type=COUNT, default=15, show_default=True, help="Measured rounds; two more warm up.")
@cpu_note_option
@output_option
def speed(arch: str, size: int, batches: Sequence[int], rounds: int, cpu_note: str | None, output: Path) -> None:
    """Speed of the INT8 graphs in ONNX Runtime on the CPU, in turn with fp32."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_models(arch, size, Path(scratch))
        sessions = {name: open_session(str(path)) for name, path in paths.items()}
        for batch in batches:
            images = np.random.default_rng(1).standard_normal((batch, 3, size, size)).astype(np.float32)
            times: dict[str, list[float]] = {name: [] for name in sessions}
            for number in range(rounds + 2):
                for name, session in sessions.items():
                    elapsed = time_once(session, images, max(1, 16 // batch))
                    # The first two rounds warm up.
                    times[name] += [elapsed] if number >= 2 else []
            results.append({"arch": arch, "size": size, "batch": batch, **compare_times(times)})
            print(results[-1], flush=True)
    what = f"int8-speed-{arch}-{size}{'-without-vnni' if saturates_here() else ''}"
    path = write_record(output, what, results, cpu_note=cpu_note, rounds=rounds)
    print(f"written {path}")
