"""How long quantizing takes: this project's recipes and nvidia-modelopt in turn, in one process, on the same images.

    python bench/int8.py time --checkpoint CKPT --calib DIR -o bench/results
    python bench/int8.py time --arch A0 --size 224 --no-peers --rounds 1 --calib DIR -o bench/results

From the fused net (for modelopt: its ONNX file) and the images in memory to the written INT8 file. Two threads; one
round ahead of the measured ones pays for imports. modelopt is installed as `tools.py` says.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from int8_bench.options import COUNT, FILE, FOLDER, count_option, output_option, recipes_option
from int8_bench.setup import PIXELS, fuse_seeded, load_fused, quantize_ours, read_calibration, write_record
from int8_bench.tools import quantize_modelopt
from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.workflows.export import peak_bytes


@click.command(name="time")
@click.option("--checkpoint", type=FILE, metavar="CKPT", help="The net to quantize.")
@click.option("--arch", help="Seeded weights in place of a checkpoint; the time does not depend on them.")
@click.option("--size", type=COUNT, default=PIXELS, show_default=True, metavar="PX", help="Size of the images.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Time nvidia-modelopt too.")
@click.option("--calib", type=FOLDER, required=True, metavar="DIR", help="Calibration images.")
@count_option
@click.option("--rounds", type=COUNT, default=3, show_default=True, help="Measured rounds.")
@recipes_option("fast", "accurate")
@output_option
def time_quantizing(checkpoint: Path | None, arch: str | None, output: Path, **options: Any) -> None:
    """How long quantizing takes, in turn with nvidia-modelopt."""
    if (checkpoint is None) == (arch is None):
        raise click.UsageError("give one of --checkpoint and --arch")
    torch.set_num_threads(2)
    fused = load_fused(checkpoint) if checkpoint else fuse_seeded(str(arch))
    plan = Plan(**options)
    seconds = time_in_turn(fused, plan)
    first = next(iter(seconds.values()))
    results = [
        {
            "tool": name,
            "median_s": round(statistics.median(values), 2),
            # The median of the ratios of the rounds: both of a round meet the same moment of the machine.
            "x_first": round(statistics.median(own / other for own, other in zip(values, first, strict=True)), 2),
            "seconds": values,
        }
        for name, values in seconds.items()
    ]
    print(*results, sep="\n")
    what = "int8-time" if checkpoint else f"int8-time-{arch}-{plan.size}"
    path = write_record(output, what, results, calibration_images=plan.count, size=plan.size, peak_bytes=peak_bytes())
    print(f"written {path}")


@dataclass(frozen=True)
class Plan:
    """What is quantized how often, and by which recipes and tools."""

    calib: Path
    count: int
    size: int
    recipes: tuple[str, ...]
    peers: bool
    rounds: int


def time_in_turn(fused: RepVGG, plan: Plan) -> dict[str, list[float]]:
    """The wall seconds of every tool in every round, this project's first recipe first."""
    size = plan.size
    images = read_calibration(plan.calib, plan.count, preprocessing=Preprocessing(size, size, size))
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        write_graph(to_onnx(fused, FloatLayers(), GraphOptions(size, size), {}), source)
        jobs: dict[str, Callable[[], None]] = {
            f"repvgg-deploy {name}": partial(quantize_ours, fused, name, images, target) for name in plan.recipes
        }
        if plan.peers:
            jobs["modelopt entropy"] = partial(quantize_modelopt, source, "entropy", images, target)
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        # Without a peer there is nothing to be fair to: the imports count.
        warm_up = 1 if plan.peers else 0
        for number in range(plan.rounds + warm_up):
            for name, job in jobs.items():
                start = time.perf_counter()
                job()
                elapsed = round(time.perf_counter() - start, 2)
                print(name, elapsed, "(not counted)" if number < warm_up else "", flush=True)
                seconds[name] += [elapsed] if number >= warm_up else []
    return seconds
