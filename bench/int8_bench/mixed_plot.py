"""The plot of `mixed`. Apart, so that the other commands run without matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repvgg_deploy.benchmark.report.plots import COLOURS, STYLE

BLUE, ORANGE = COLOURS[:2]


def write_plot(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the curves as `int8_mixed.png` and `int8_mixed.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = draw_curves(results)
        for ending in ("png", "svg"):
            # Without a date the same results give the same file.
            about = {"Date": None} if ending == "svg" else None
            figure.savefig(folder / f"int8_mixed.{ending}", dpi=160, metadata=about)


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
