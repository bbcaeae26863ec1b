"""Learning curves of quantization-aware training, as a plot."""

from __future__ import annotations

import csv
from pathlib import Path

from repvgg_deploy.benchmark.report.plots import COLOURS, STYLE
from repvgg_deploy.errors import DeployError

_PERCENT = {
    "agreement": "agreement, training images",
    "held_out_agreement": "agreement, held-out images",
    "val_agreement": "agreement, validation",
    "val_top1": "top-1, validation",
}


def draw_curves(curves: Path) -> Path:
    """Draw the columns of a `.csv` of learning curves over the steps, to a `.png` beside it.

    Raises:
        DeployError: matplotlib is not installed, or the file has no rows.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DeployError("matplotlib is not installed", "pip install matplotlib") from error
    with curves.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise DeployError(f"{curves} has no rows", "give the .csv that qat wrote")
    target = curves.with_suffix(".png")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.1), layout="constrained")
        loss, percent = figure.subplots(1, 2, sharex=True)
        loss.plot(*_points(rows, "loss"), "o-", markersize=3, color=COLOURS[0])
        loss.set(xlabel="step", ylabel="loss", ylim=(0, None))
        for number, (column, label) in enumerate(_PERCENT.items()):
            if column in rows[0]:
                percent.plot(*_points(rows, column), "o-", markersize=3, label=label, color=COLOURS[number])
        percent.set(xlabel="step", ylabel="percent")
        figure.legend(*percent.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
        figure.savefig(target, dpi=150, metadata={"Software": None})
    return target


def _points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column, where it has one: before the first step there is no loss."""
    found = [row for row in rows if row[column]]
    return [int(row["step"]) for row in found], [float(row[column]) for row in found]
