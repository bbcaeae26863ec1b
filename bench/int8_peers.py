"""Accuracy of INT8 by ONNX Runtime, nvidia-modelopt and this project, on the same net, images and evaluation.

    python bench/int8_peers.py --checkpoint CKPT --calib DIR --val DIR -o bench/results

Every graph runs in ONNX Runtime on the CPU, every convolution in INT8. This project's files are those of `export
--qdq`, measured as they are, and where TensorRT can run them as it reads them too (uint8 is int8 there). modelopt is
measured where it is installed: `pip install --no-deps nvidia-modelopt==0.47.0 onnx-graphsurgeon polygraphy onnxslim
onnxconverter-common` and its pure-Python dependencies.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from int8_setup import (
    PIXELS,
    Floats,
    add_data_options,
    compare,
    in_batches,
    load_fused,
    quantize_ours,
    read_calibration,
    read_validation,
    run_onnx,
    run_torch,
    timed,
    write_as_tensorrt_reads,
    write_record,
)

from repvgg_deploy.onnx_export import FloatLayers, GraphOptions, to_onnx
from repvgg_deploy.onnx_graph import write_graph


def quantize_onnxruntime(source: Path, method: str, per_channel: bool, images: Floats, target: Path) -> None:
    """ONNX Runtime's `quantize_static`, with its default types."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Floats] = iter(in_batches(images))

        def get_next(self) -> dict[str, Floats] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    calibration = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }[method]
    quantize_static(str(source), str(target), Reader(), per_channel=per_channel, calibrate_method=calibration)


def quantize_modelopt(source: Path, method: str, images: Floats, target: Path) -> None:
    """nvidia-modelopt's ONNX quantization."""
    from modelopt.onnx.quantization import quantize as modelopt_quantize

    modelopt_quantize(
        str(source),
        quantize_mode="int8",
        calibration_data=images,
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(target),
    )


def main() -> None:
    """Quantize with every tool, evaluate, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_options(parser)
    parser.add_argument("--only", nargs="*", help="parts of the names of the rows to measure")
    arguments = parser.parse_args()
    fused = load_fused(arguments.checkpoint)
    calibration = read_calibration(arguments.calib, arguments.count)
    images, labels = read_validation(arguments.val)
    exact = run_torch(fused, images)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:

        def path_of(name: str) -> Path:
            return Path(scratch) / f"{name.replace(' ', '-')}.onnx"

        source = path_of("fp32")
        write_graph(to_onnx(fused, FloatLayers(), GraphOptions(PIXELS, PIXELS), {}), source)
        jobs: dict[str, Callable[[Path], None]] = {}
        for per_channel, methods in product((False, True), ("minmax", "percentile", "entropy")):
            name = f"onnxruntime {'per-channel' if per_channel else 'per-tensor'} {methods}"
            jobs[name] = partial(quantize_onnxruntime, source, methods, per_channel, calibration)
        if importlib.util.find_spec("modelopt") is None:
            print("nvidia-modelopt is not installed: its rows are left out", file=sys.stderr)
        else:
            for method in ("max", "entropy"):
                jobs[f"modelopt {method}"] = partial(quantize_modelopt, source, method, calibration)
        for recipe in ("fast", "accurate", "thorough"):
            ours = f"repvgg-deploy {recipe}"
            jobs[ours] = partial(quantize_ours, fused, recipe, calibration)
            jobs[f"{ours}, as TensorRT"] = partial(write_as_tensorrt_reads, path_of(ours))
        for name, job in jobs.items():
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            target = path_of(name)
            _, seconds = timed(partial(job, target))
            figures = compare(run_onnx(target, images), exact, labels)
            results.append({"tool": name, "seconds": seconds, "bytes": target.stat().st_size, **asdict(figures)})
            print(results[-1], flush=True)
            # After each row: the slow ones come last.
            path = write_record(arguments.output, "int8-peers", results, calibration_images=len(calibration))
            print(f"fp32 top-1 {np.mean(exact.argmax(1) == labels) * 100:.2f}; written {path}")


if __name__ == "__main__":
    main()
