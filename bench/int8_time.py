"""How long quantizing takes: this project's recipes and nvidia-modelopt in turn, in one process, on the same images.

    python bench/int8_time.py --checkpoint CKPT --calib DIR -o bench/results
    python bench/int8_time.py --arch A0 --size 224 --no-peers --rounds 1 --calib DIR -o bench/results

From the fused net (for modelopt: its ONNX file) and the images in memory to the written INT8 file. Two threads; one
round ahead of the measured ones pays for imports. modelopt is installed as `int8_tools.py` says.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from int8_setup import PIXELS, fuse_seeded, load_fused, quantize_ours, read_calibration, write_record
from int8_tools import quantize_modelopt

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.repvgg import FloatLayers, GraphOptions, to_onnx
from repvgg_deploy.workflows.export import peak_bytes


def main() -> None:
    """Time every tool in turn; print and record medians and all times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    net = parser.add_mutually_exclusive_group(required=True)
    net.add_argument("--checkpoint", type=Path)
    net.add_argument("--arch", help="seeded weights in place of a checkpoint; the time does not depend on them")
    parser.add_argument("--size", type=int, default=PIXELS, help="of the images, in pixels")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=["fast", "accurate"])
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    fused = load_fused(arguments.checkpoint) if arguments.checkpoint else fuse_seeded(arguments.arch)
    size = arguments.size
    images = read_calibration(arguments.calib, arguments.count, preprocessing=Preprocessing(size, size, size))
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        write_graph(to_onnx(fused, FloatLayers(), GraphOptions(size, size), {}), source)
        jobs: dict[str, Callable[[], None]] = {
            **{
                f"repvgg-deploy {name}": partial(quantize_ours, fused, name, images, target)
                for name in arguments.recipes
            },
        }
        if arguments.peers:
            jobs["modelopt entropy"] = partial(quantize_modelopt, source, "entropy", images, target)
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        # Without a peer there is nothing to be fair to: the imports count.
        warm_up = 1 if arguments.peers else 0
        for number in range(arguments.rounds + warm_up):
            for name, job in jobs.items():
                start = time.perf_counter()
                job()
                elapsed = round(time.perf_counter() - start, 2)
                print(name, elapsed, "(not counted)" if number < warm_up else "", flush=True)
                seconds[name] += [elapsed] if number >= warm_up else []
    results = [{"tool": n, "median_s": round(statistics.median(s), 2), "seconds": s} for n, s in seconds.items()]
    print(*results, sep="\n")
    what = "int8-time" if arguments.checkpoint else f"int8-time-{arguments.arch}-{size}"
    path = write_record(
        arguments.output, what, results, calibration_images=arguments.count, size=size, peak_bytes=peak_bytes()
    )
    print(f"written {path}")


if __name__ == "__main__":
    main()
