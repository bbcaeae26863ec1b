"""How much the INT8 figures depend on which calibration images were drawn: the recipes on further draws.

    python bench/int8_draws.py --checkpoint CKPT --calib DIR --val DIR --seeds 11 12 13 -o bench/results

Settings were chosen with the images of seed 0; the figures here are of draws that no setting was chosen with. Every
graph runs in ONNX Runtime on the CPU, with every convolution and the classifier in INT8.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from int8_peers import quantize_ours
from int8_setup import (
    add_data_options,
    compare,
    load_fused,
    read_calibration,
    read_validation,
    run_onnx,
    run_torch,
    timed,
    write_record,
)


def summarize(rows: Sequence[dict[str, Any]], recipe: str) -> dict[str, Any]:
    """Mean and sample standard deviation over the draws of one recipe; the drop is in points, positive where it lost.

    The spread is None for a single draw.
    """
    own = [row for row in rows if row["recipe"] == recipe]
    values = {
        "drop": [row["top1_fp32"] - row["top1"] for row in own],
        "agreement": [row["agreement"] for row in own],
        "sqnr_db": [row["sqnr_db"] for row in own],
    }
    return {
        "recipe": recipe,
        "draws": len(own),
        "mean": {name: round(statistics.mean(given), 2) for name, given in values.items()},
        "spread": {n: round(statistics.stdev(given), 2) if len(given) > 1 else None for n, given in values.items()},
    }


def main() -> None:
    """Quantize with every draw, evaluate, print and record rows and summaries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--recipes", nargs="+", default=["fast", "accurate"])
    arguments = parser.parse_args()
    fused = load_fused(arguments.checkpoint)
    images, labels = read_validation(arguments.val)
    exact = run_torch(fused, images)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "int8.onnx"
        for seed in arguments.seeds:
            calibration = read_calibration(arguments.calib, arguments.count, seed)
            for recipe in arguments.recipes:
                _, seconds = timed(partial(quantize_ours, fused, recipe, calibration, target))
                figures = compare(run_onnx(target, images), exact, labels)
                rows.append({"recipe": recipe, "seed": seed, "seconds": seconds, **asdict(figures)})
                print(rows[-1], flush=True)
    summary = [summarize(rows, recipe) for recipe in arguments.recipes]
    print(*summary, sep="\n")
    path = write_record(arguments.output, "int8-draws", rows, calibration_images=arguments.count, summary=summary)
    print(f"written {path}")


if __name__ == "__main__":
    main()
