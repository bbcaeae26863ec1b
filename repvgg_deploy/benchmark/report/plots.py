"""Plots of benchmark results, as PNG and SVG; fit for paper: no chart junk, colours that the colour-blind can tell."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from repvgg_deploy.benchmark.report.tables import name_machine
from repvgg_deploy.errors import DeployError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]

# Okabe and Ito's palette: told apart with every common colour vision (https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vP*X"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # The names of models and machines are text, even with a dollar sign in them.
    "text.parse_math": False,
    # The same results give the same bytes.
    "svg.hashsalt": "repvgg-deploy",
}


@dataclass(frozen=True)
class Title:
    """What a plot shows, and below it where that was measured."""

    text: str
    machine: str


@dataclass(frozen=True)
class Plot:
    """A plot with its title; `name` is that of its files."""

    name: str
    title: str
    png: bytes
    svg: str


def draw_plots(records: Sequence[dict[str, Any]], baseline: str = "ResNet-50") -> list[Plot]:
    """All plots that the results have something for.

    Raises:
        DeployError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise DeployError("matplotlib is not installed", "pip install matplotlib") from error
    plots: list[Plot] = []
    with mpl.rc_context(STYLE):
        plots += _plots_of_results(records)
        plots += _plots_of_ratios(records, baseline)
        plots += _rooflines(records)
    return plots


def _all(records: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [row for record in records for row in record[key]]


def _machine(records: Sequence[dict[str, Any]], backend: str) -> str:
    """The processors that a backend ran on."""
    names = [
        name_machine(record, [backend])
        for record in records
        if any(result["backend"] == backend for result in record["results"])
    ]
    return "; ".join(dict.fromkeys(names))


def _plots_of_results(records: Sequence[dict[str, Any]]) -> Iterator[Plot]:
    """Accuracy over speed, throughput and latency over the batch size."""
    results = [r for r in _all(records, "results") if r["form"] == "deploy"]
    for backend, precision, batch in _distinct(results, "backend", "precision", "batch"):
        chosen = [
            r for r in results
            if (r["backend"], r["precision"], r["batch"]) == (backend, precision, batch) and r["top1"] is not None
        ]  # fmt: skip
        if len({r["model"] for r in chosen}) >= 3:
            title = Title(f"Accuracy and speed: {backend} {precision}, batch {batch}", _machine(records, backend))
            yield _draw(f"accuracy_{backend}_{precision}_b{batch}", title, _accuracy, chosen)
    for backend, precision in _distinct(results, "backend", "precision"):
        chosen = [r for r in results if (r["backend"], r["precision"]) == (backend, precision)]
        if len({r["batch"] for r in chosen}) >= 2:
            where, machine = f"{backend} {precision}", _machine(records, backend)
            title = Title(f"Throughput by batch size: {where}", machine)
            yield _draw(f"throughput_{backend}_{precision}", title, _throughput, chosen)
            title = Title(f"Latency by batch size: {where}", machine)
            yield _draw(f"latency_{backend}_{precision}", title, _latency, chosen)


def _plots_of_ratios(records: Sequence[dict[str, Any]], baseline: str) -> Iterator[Plot]:
    """Models against the baseline, and the deploy form against the training form."""
    ratios = _all(records, "ratios")
    for (backend,) in _distinct(ratios, "backend"):
        to_baseline = [r for r in ratios if r["backend"] == backend and _is_ratio_to(r, baseline)]
        if to_baseline:
            title = Title(f"Speed against {baseline}: {backend}", _machine(records, backend))
            yield _draw(f"ratio_{backend}", title, _ratios, to_baseline, baseline)
    fused = [r for r in ratios if r["form"] == "deploy" and r["baseline_form"] == "training"]
    if fused:
        machines = dict.fromkeys(_machine(records, backend) for (backend,) in _distinct(fused, "backend"))
        title = Title("Gain of fusing: deploy form over training form", "; ".join(machines))
        yield _draw("fused_over_training", title, _fused, fused)


def _rooflines(records: Sequence[dict[str, Any]]) -> Iterator[Plot]:
    results = [r for r in _all(records, "results") if r["form"] == "deploy" and r["roofline"]]
    for name, ceiling in _ceilings(records).items():
        device, precision = name.split(" ")
        chosen = [r for r in results if r["precision"] == precision and _runs_on(r, device)]
        if chosen:
            title = Title(f"Roofline: {device} {precision}", _machine(records, chosen[0]["backend"]))
            yield _draw(f"roofline_{device}_{precision}", title, _roofline, chosen, ceiling)


def _is_ratio_to(ratio: dict[str, Any], baseline: str) -> bool:
    return bool(ratio["baseline"] == baseline and ratio["form"] == ratio["baseline_form"] == "deploy")


def _runs_on(result: Result, device: str) -> bool:
    return bool(result["backend"].endswith("-cpu") == (device == "cpu"))


def _ceilings(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: ceiling for record in records for name, ceiling in record["ceilings"].items()}


def _distinct(rows: Iterable[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def _draw(name: str, title: Title, paint: Callable[..., None], *arguments: Any) -> Plot:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    paint(axes, *arguments)
    # The paper's own width: long names of processors go to a second line.
    figure.suptitle(title.text, x=0.01, ha="left", fontsize=10)
    axes.set_title("\n".join(textwrap.wrap(title.machine, 90)), loc="left", fontsize=8, color="#555555")
    return Plot(name, f"{title.text}. {title.machine}", _save(figure, "png"), _save(figure, "svg").decode())


def _save(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # Without a date, the same results give the same file.
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def family_of(model: str) -> str:
    """The line of a plot that a model belongs to: `RepVGG-A`, `RepVGG-B`, `ResNet` and so on."""
    if model.startswith("RepVGG-"):
        return model[: len("RepVGG-") + 1]
    return model.split("-")[0]


def _by_family(results: Sequence[Result]) -> dict[str, list[Result]]:
    families: dict[str, list[Result]] = {}
    for result in results:
        families.setdefault(family_of(result["model"]), []).append(result)
    return families


def _accuracy(axes: Axes, results: Sequence[Result]) -> None:
    """The paper's figure: top-1 over measured speed, one line per family.

    The accuracy is that of the fp32 model as published; that of an INT8 one is lower, by how much is not measured here.
    """
    exact = results[0]["precision"] != "int8"
    points: list[tuple[float, float, str]] = []
    for index, (family, members) in enumerate(sorted(_by_family(results).items())):
        # Where two runs measured the same model, the first counts.
        unique = list({member["model"]: member for member in reversed(members)}.values())
        plain = sorted(
            (m for m in unique if "g" not in m["model"].rsplit("-", 1)[-1]), key=lambda m: -m["images_per_sec"]
        )
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        line: dict[str, Any] = {"linestyle": "-"} if exact else {"linestyle": ":", "markerfacecolor": "white"}
        axes.plot(
            *_columns(plain, "images_per_sec", "top1"), label=family, linewidth=1.4, markersize=5, **line, **style
        )
        grouped = [m for m in unique if m not in plain]
        axes.plot(*_columns(grouped, "images_per_sec", "top1"), linestyle="none", markerfacecolor="white", **style)
        points += [(m["images_per_sec"], m["top1"], _short_name(m["model"])) for m in unique]
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("images / s")
    axes.set_ylabel("fp32 ImageNet top-1, as published (%)")
    if not exact:
        axes.set_xlabel("images / s\nAccuracy is that of fp32, as published; that of INT8 is not measured here.")
    axes.margins(x=0.12, y=0.12)
    axes.legend()
    from repvgg_deploy.benchmark.report.labels import label_points

    label_points(axes, points, fontsize=8, color="#333333")


def _columns(rows: Sequence[Result], *names: str) -> tuple[list[float], ...]:
    return tuple([row[name] for row in rows] for name in names)


def _plain_ticks(axis: Any, minor: bool = True) -> None:
    """Numbers such as 50 and 2,000 on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    if minor:
        axis.set_minor_formatter(NullFormatter())


def _over_batch(axes: Axes, results: Sequence[Result], value: Callable[[Result], float]) -> None:
    models = sorted({r["model"] for r in results}, key=lambda m: (family_of(m), -_first(results, m)))
    families = sorted({family_of(model) for model in models})
    dashes = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (1, 2)))
    for model in models:
        index = families.index(family_of(model))
        number = [m for m in models if family_of(m) == family_of(model)].index(model)
        by_batch = {r["batch"]: r for r in reversed(results) if r["model"] == model}
        rows = [by_batch[batch] for batch in sorted(by_batch)]
        axes.plot(
            [r["batch"] for r in rows], [value(r) for r in rows], label=model, color=COLOURS[index % len(COLOURS)],
            linestyle=dashes[number % len(dashes)], marker=_MARKERS[index % len(_MARKERS)], markersize=4, linewidth=1.3,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({r["batch"] for r in results})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("batch")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _first(results: Sequence[Result], model: str) -> float:
    return max(float(r["images_per_sec"]) for r in results if r["model"] == model)


def _throughput(axes: Axes, results: Sequence[Result]) -> None:
    _over_batch(axes, results, lambda r: float(r["images_per_sec"]))
    axes.set_ylabel("images / s")


def _latency(axes: Axes, results: Sequence[Result]) -> None:
    _over_batch(axes, results, lambda r: float(r["latency_ms"]["p50"]))
    axes.set_ylabel("latency of a batch, median (ms)")


def _ratios(axes: Axes, ratios: Sequence[dict[str, Any]], baseline: str) -> None:
    """Ratios to the baseline with their intervals; the baseline is the line at 1."""
    chosen = [r for r in ratios if r["model"] != baseline]
    models = sorted({r["model"] for r in chosen}, key=lambda m: max(r["ratio"] for r in chosen if r["model"] == m))
    series = _distinct(chosen, "precision", "batch")
    _dot_rows(axes, chosen, models, series, lambda r: (r["precision"], r["batch"]), lambda s: f"{s[0]}, batch {s[1]}")
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xlabel(f"images/s relative to {baseline}, with {chosen[0]['confidence']:.0%} interval" if chosen else "")


def _dot_rows(
    axes: Axes,
    ratios: Sequence[dict[str, Any]],
    models: Sequence[str],
    series: Sequence[tuple[Any, ...]],
    key: Callable[[dict[str, Any]], tuple[Any, ...]],
    label: Callable[[tuple[Any, ...]], str],
) -> None:
    """One row per model, and one dot with its interval per series."""
    axes.axvline(1.0, color="#444444", linewidth=1)
    for number, which in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * 0.7 / max(len(series), 1)
        rows = [r for r in ratios if key(r) == which]
        values = [r["ratio"] for r in rows]
        errors = [[r["ratio"] - r["low"] for r in rows], [r["high"] - r["ratio"] for r in rows]]
        axes.errorbar(
            values, [models.index(r["model"]) - offset for r in rows], xerr=errors, label=label(which),
            fmt=_MARKERS[number % len(_MARKERS)], color=COLOURS[number % len(COLOURS)],
            markersize=4.5, capsize=2, linewidth=1.2,
        )  # fmt: skip
    axes.set_yticks(range(len(models)), models)
    axes.grid(False, axis="y")
    axes.legend(fontsize=8)
    cast(Any, axes.figure).set_size_inches(6.4, max(3.0, 1.2 + 0.28 * len(models)))


def _fused(axes: Axes, ratios: Sequence[dict[str, Any]]) -> None:
    models = sorted({r["model"] for r in ratios}, reverse=True)
    series = _distinct(ratios, "backend", "precision", "mode", "batch")

    def label(which: tuple[Any, ...]) -> str:
        backend, precision, mode, batch = which
        return f"{backend} {precision}{', ' + mode if mode else ''}, batch {batch}"

    _dot_rows(axes, ratios, models, series, lambda r: (r["backend"], r["precision"], r["mode"], r["batch"]), label)
    axes.set_xlabel(f"images/s relative to the training form, with {ratios[0]['confidence']:.0%} interval")


def _roofline(axes: Axes, results: Sequence[Result], ceiling: dict[str, Any]) -> None:
    """Achieved operations over operations per byte, under what the machine was measured to do."""
    peak, bandwidth = ceiling["flops_per_sec"] / 1e12, ceiling["bytes_per_sec"] / 1e12
    intensities = [r["roofline"]["flops_per_byte"] for r in results]
    ridge = peak / bandwidth
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color="#444444", linewidth=1.4)
    unit = "TOP/s" if results[0]["precision"] == "int8" else "TFLOP/s"
    axes.annotate(f"{peak:.3g} {unit}", (high, peak), (-2, 4), textcoords="offset points", ha="right", fontsize=8)
    for index, batch in enumerate(sorted({r["batch"] for r in results})):
        rows = [r for r in results if r["batch"] == batch]
        axes.plot(
            [r["roofline"]["flops_per_byte"] for r in rows], [r["roofline"]["tflops"] for r in rows],
            linestyle="none", label=f"batch {batch}", color=COLOURS[index % len(COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)], markersize=5,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel(unit)
    axes.legend(loc="lower right")
    points = [(r["roofline"]["flops_per_byte"], r["roofline"]["tflops"], _short_name(r["model"])) for r in results]
    from repvgg_deploy.benchmark.report.labels import label_points

    label_points(axes, points, fontsize=6.5, color="#333333")


def _short_name(model: str) -> str:
    return model.removeprefix("RepVGG-").replace("ResNet-", "R")
