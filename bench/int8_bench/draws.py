"""How much the INT8 figures depend on which calibration images were drawn: the recipes on further draws.

    python bench/int8.py draws --checkpoint CKPT --calib DIR --val DIR --seed 11 --seed 12 --seed 13 -o bench/results

Every graph runs in ONNX Runtime on the CPU, with every convolution and the classifier in INT8: the files of
`export --int8`, as they are and as TensorRT reads them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import click

from int8_bench.options import Data, data_options, recipes_option
from int8_bench.setup import (
    compare,
    load_fused,
    read_calibration,
    read_validation,
    run_ours,
    run_torch,
    write_record,
)
from repvgg_deploy.quantization import load_recipe


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


@click.command()
@data_options
@click.option(
    "--seed", "seeds", type=int, multiple=True, default=(11, 12, 13), show_default=True, help="A draw; repeatable."
)
@recipes_option("fast", "accurate", "thorough")
@click.option("--full-range", is_flag=True, help="Activations up to 255, as with `export --full-range`.")
@click.option("--name", default="int8-draws", show_default=True, help="Name of the record.")
def draws(data: Data, seeds: Sequence[int], recipes: Sequence[str], full_range: bool, name: str) -> None:
    """The recipes on several draws of calibration images.

    Settings were chosen with other draws, but for the augmentations of an image, for which seed 11 was looked at too;
    other seeds give draws that no setting was chosen with.
    """
    fused = load_fused(data.checkpoint)
    images, labels = read_validation(data.val)
    exact = run_torch(fused, images)
    rows: list[dict[str, Any]] = []
    for seed, recipe in product(seeds, recipes):
        calibration = read_calibration(data.calib, data.count, seed)
        logits, seconds = run_ours(fused, replace(load_recipe(recipe), full_range=full_range), calibration, images)
        for runs_on, values in logits.items():
            row = {"recipe": recipe, "runs_on": runs_on, "seed": seed, "seconds": seconds}
            rows.append({**row, **asdict(compare(values, exact, labels))})
            print(rows[-1], flush=True)
        # After each draw: one that is stopped leaves what it has.
        ways = dict.fromkeys((row["recipe"], row["runs_on"]) for row in rows)
        summary = [summarize(rows, *way) for way in ways]
        path = write_record(
            data.output, name, rows, calibration_images=data.count, full_range=full_range, summary=summary
        )
    print(*summary, sep="\n")
    print(f"written {path}")
