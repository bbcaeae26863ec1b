"""What keeping layers in float gains: agreement and SQNR over the share of multiply-adds that is not INT8.

    python bench/int8_mixed.py --checkpoint CKPT --calib DIR --val DIR -o bench/results --plots bench/plots

Layers are taken by measured sensitivity (`repvgg_deploy.quantization.mixed_precision`), and for comparison in
random order. The ranking is made on calibration images. Each candidate is quantized anew with its float layers, and
evaluated in the torch net that computes the graph's integers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from int8_setup import (
    add_data_options,
    compare,
    in_batches,
    load_fused,
    read_calibration,
    read_validation,
    run_torch,
    write_record,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repvgg_deploy.benchmark.report.plots import COLOURS, STYLE
from repvgg_deploy.quantization import load_recipe, quantize
from repvgg_deploy.quantization.mixed_precision import RANKING_IMAGES, LayerSensitivity, layers_within, rank_layers
from repvgg_deploy.quantization.statistics import collect_statistics

BLUE, ORANGE = COLOURS[:2]


def shuffle(ranking: Sequence[LayerSensitivity], seed: int) -> tuple[LayerSensitivity, ...]:
    """The same layers in an order that `seed` draws."""
    order = np.random.default_rng(seed).permutation(len(ranking))
    return tuple(ranking[index] for index in order)


def draw_curves(results: Sequence[dict[str, Any]]) -> Figure:
    """Agreement and SQNR over the share of float multiply-adds; random choices as points and a line of means."""
    figure = Figure(figsize=(10.4, 3.4), layout="constrained")
    labels = {
        "agreement": "agreement with fp32, %",
        "median_db": "SQNR of the median image, dB",
        "sqnr_db": "SQNR over all images, dB",
    }
    for axes, (key, label) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
        _draw_curve(axes, results, key)
        axes.set_xlabel("multiply-adds kept float, %")
        axes.set_ylabel(label)
    figure.axes[0].legend(loc="upper left")
    return figure


def _draw_curve(axes: Axes, results: Sequence[dict[str, Any]], key: str) -> None:
    none = [row for row in results if row["share"] == 0]
    chosen = none + [row for row in results if row["choice"] == "sensitivity" and row["share"]]
    drawn = [row for row in results if row["choice"] == "random"]
    shares = sorted({row["share"] for row in drawn})
    groups = [[row for row in drawn if row["share"] == share] for share in shares]
    means = [(np.mean([r["macs_float"] for r in g]), np.mean([r[key] for r in g])) for g in groups]
    x, y = zip(*[(none[0]["macs_float"], none[0][key]), *means], strict=True)
    axes.plot(np.array(x) * 100, y, color=ORANGE, linestyle="--", label="at random: mean, and each draw")
    x, y = zip(*[(row["macs_float"] * 100, row[key]) for row in drawn], strict=True)
    axes.plot(x, y, "o", color=ORANGE, markersize=3.5, alpha=0.7)
    x, y = zip(*[(row["macs_float"] * 100, row[key]) for row in chosen], strict=True)
    axes.plot(x, y, color=BLUE, marker="o", label="by measured sensitivity")


def main() -> None:
    """Quantize with every share and choice; print, record and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_options(parser)
    parser.add_argument("--every", type=int, default=1, help="evaluate every n-th image")
    parser.add_argument("--recipe", default="accurate")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of the random choices")
    parser.add_argument("--calib-seed", type=int, default=0)
    parser.add_argument("--plots", type=Path, default=Path("bench/plots"))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    fused, recipe = load_fused(arguments.checkpoint), load_recipe(arguments.recipe)
    images, labels = read_validation(arguments.val)
    images, labels = images[:: arguments.every], labels[:: arguments.every]
    exact = run_torch(fused, images)
    calibration = read_calibration(arguments.calib, arguments.count, arguments.calib_seed)
    batches = in_batches(calibration)
    statistics = collect_statistics(fused, batches, augmentations=recipe.augmentations)
    step = max(1, len(calibration) // RANKING_IMAGES)
    apart = quantize(fused, batches, recipe, statistics, chained=False)
    ranking = rank_layers(apart, torch.from_numpy(calibration[::step]))
    shares = {layer.name: layer.macs_share for layer in ranking}
    orders = {("sensitivity", None): ranking, **{("random", s): shuffle(ranking, s) for s in arguments.seeds}}
    results: list[dict[str, Any]] = []
    for (choice, seed), order in orders.items():
        for share in arguments.shares:
            if choice == "random" and share == 0:
                continue
            names = layers_within(order, share)
            net = quantize(fused, batches, recipe, statistics, keep_float=names)
            figures = compare(run_torch(net, images), exact, labels)
            macs = round(sum(shares[name] for name in names), 4)
            row = {"choice": choice, "seed": seed, "share": share, "macs_float": macs, "layers": list(names)}
            results.append({**row, **asdict(figures)})
            print(results[-1], flush=True)
            path = write_record(
                arguments.output, "int8-mixed", results, calibration_images=len(calibration), recipe=arguments.recipe,
                ranking=[{**asdict(layer), "gain": layer.gain} for layer in ranking],
            )  # fmt: skip
    print(f"written {path}")
    arguments.plots.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = draw_curves(results)
        for ending in ("png", "svg"):
            # Without a date the same results give the same file.
            about = {"Date": None} if ending == "svg" else None
            figure.savefig(arguments.plots / f"int8_mixed.{ending}", dpi=160, metadata=about)


if __name__ == "__main__":
    main()
