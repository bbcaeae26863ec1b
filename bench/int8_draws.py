"""How much the INT8 figures depend on which calibration images were drawn: the recipes on further draws.

    python bench/int8_draws.py --checkpoint CKPT --calib DIR --val DIR --seeds 11 12 13 -o bench/results

Settings were chosen with other draws, but for the augmentations of an image, for which seed 11 was looked at too; other
`--seeds` give draws that no setting was chosen with. Every graph runs in ONNX Runtime on the CPU, with every
convolution and the classifier in INT8: the files of `export --int8`, as they are and as TensorRT reads them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from int8_setup import (
    add_data_options,
    compare,
    load_fused,
    read_calibration,
    read_validation,
    run_ours,
    run_torch,
    write_record,
)


def summarize(rows: Sequence[dict[str, Any]], recipe: str, runs_on: str) -> dict[str, Any]:
    """Mean and sample standard deviation over the draws of one recipe; the drop is in points, positive where it lost.

    The spread is None for a single draw.
    """
    own = [row for row in rows if (row["recipe"], row["runs_on"]) == (recipe, runs_on)]
    values = {
        "drop": [row["top1_fp32"] - row["top1"] for row in own],
        "agreement": [row["agreement"] for row in own],
        "sqnr_db": [row["sqnr_db"] for row in own],
    }
    return {
        "recipe": recipe,
        "runs_on": runs_on,
        "draws": len(own),
        # Adding 0.0 makes 0.0 of -0.0.
        "mean": {name: round(statistics.mean(given), 2) + 0.0 for name, given in values.items()},
        "spread": {n: round(statistics.stdev(given), 2) if len(given) > 1 else None for n, given in values.items()},
    }


def main() -> None:
    """Quantize with every draw, evaluate, print and record rows and summaries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--recipes", nargs="+", default=["fast", "accurate", "thorough"])
    parser.add_argument("--name", default="int8-draws", help="of the record")
    arguments = parser.parse_args()
    fused = load_fused(arguments.checkpoint)
    images, labels = read_validation(arguments.val)
    exact = run_torch(fused, images)
    rows: list[dict[str, Any]] = []
    for seed, recipe in product(arguments.seeds, arguments.recipes):
        calibration = read_calibration(arguments.calib, arguments.count, seed)
        logits, seconds = run_ours(fused, recipe, calibration, images)
        for runs_on, values in logits.items():
            row = {"recipe": recipe, "runs_on": runs_on, "seed": seed, "seconds": seconds}
            rows.append({**row, **asdict(compare(values, exact, labels))})
            print(rows[-1], flush=True)
        # After each draw: one that is stopped leaves what it has.
        ways = dict.fromkeys((row["recipe"], row["runs_on"]) for row in rows)
        summary = [summarize(rows, *way) for way in ways]
        count = arguments.count
        path = write_record(arguments.output, arguments.name, rows, calibration_images=count, summary=summary)
    print(*summary, sep="\n")
    print(f"written {path}")


if __name__ == "__main__":
    main()
