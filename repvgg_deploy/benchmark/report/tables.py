"""Benchmark results as tables: columns and rows of text, for a page, for Markdown, for whatever shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from repvgg_deploy.benchmark.report.paper import IMAGES_PER_SEC_1080TI

Record = dict[str, Any]
Setting = tuple[str, str, str, int]
"""Backend, precision, mode and batch size."""


@dataclass(frozen=True)
class Table:
    """A table with its title and a note that says what its figures are and where they were measured."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def name_machine(record: Record, backends: Iterable[str] | None = None) -> str:
    """The processor that some backends of a record ran on: the GPUs, or the CPU with its cores; both if both did."""
    machine = record["machine"]
    used = set(backends) if backends is not None else {result["backend"] for result in record["results"]}
    cpu = f"{machine['cpu']['model']}, {machine['cpu']['usable_cores']} cores"
    gpus = " and ".join(dict.fromkeys(gpu["name"] for gpu in machine["gpus"]))
    on_gpu = [backend for backend in used if not backend.endswith("-cpu")]
    names = [name for name in (gpus if on_gpu else "", cpu if len(on_gpu) < len(used) or not gpus else "") if name]
    return "; ".join(names)


def name_setting(setting: Setting) -> str:
    """A setting in words."""
    backend, precision, mode, batch = setting
    return f"{backend} {precision}{', ' + mode if mode else ''}, batch {batch}"


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a result or a ratio."""
    return row["backend"], row["precision"], row["mode"], row["batch"]


def tabulate_overview(record: Record, baseline: str) -> Table:
    """Throughput: one row per model, one column per setting, the ratio to the baseline in brackets."""
    results = [r for r in record["results"] if r["form"] == "deploy"]
    settings = sorted({setting_of(r) for r in results})
    found = {(r["model"], setting_of(r)): r for r in reversed(results)}
    ratios = {
        (r["model"], setting_of(r)): r for r in record["ratios"] if r["baseline"] == baseline and r["form"] == "deploy"
    }
    rows = [
        (
            model,
            *(_cell(found.get((model, s)), None if model == baseline else ratios.get((model, s))) for s in settings),
        )
        for model in dict.fromkeys(r["model"] for r in results)
    ]
    what = f"Images/s, in brackets relative to {baseline} with the 95 % interval" if ratios else "Images/s"
    marked = "; * unstable" if any("*" in cell for row in rows for cell in row[1:]) else ""
    note = f"{what}{marked}. {name_machine(record)}, {record['created'][:10]}."
    return Table("Throughput", note, ("model", *map(name_setting, settings)), tuple(rows))


def _cell(result: dict[str, Any] | None, ratio: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    text = f"{result['images_per_sec']:,.1f}{'*' if result['unstable'] else ''}"
    if ratio is not None:
        text += f" ({ratio['ratio']:.2f}, {ratio['low']:.2f}–{ratio['high']:.2f})"
    return text


def tabulate_fusing(record: Record) -> Table | None:
    """How many times as fast as its training form each model is; None if no training form was measured."""
    ratios = [r for r in record["ratios"] if r["baseline_form"] == "training" and r["form"] == "deploy"]
    if not ratios:
        return None
    settings = sorted({setting_of(r) for r in ratios})
    cells = {(r["model"], setting_of(r)): f"{r['ratio']:.2f} ({r['low']:.2f}–{r['high']:.2f})" for r in ratios}
    rows = [
        (model, *(cells.get((model, setting), "–") for setting in settings))
        for model in dict.fromkeys(r["model"] for r in ratios)
    ]
    note = f"Images/s of the deploy form over those of the training form. {name_machine(record)}."
    return Table("Gain of fusing", note, ("fused / training form", *map(name_setting, settings)), tuple(rows))


def tabulate_results(record: Record) -> Table:
    """One row per result."""
    columns = (
        "model", "unstable", "form", "backend", "precision", "batch", "images/s", "p50 ms", "p90 ms", "p95 ms",
        "p99 ms", "runs", "share of peak", "why unstable",
    )  # fmt: skip
    rows = tuple(
        (
            r["model"],
            "unstable" if r["unstable"] else "",
            r["form"] + (f", {r['mode']}" if r["mode"] else ""),
            f"{r['backend']} {r['backend_version']}",
            r["precision"],
            str(r["batch"]),
            f"{r['images_per_sec']:,.1f}",
            *(f"{r['latency_ms'][p]:,.2f}" for p in ("p50", "p90", "p95", "p99")),
            str(r["iterations"]),
            "" if r["roofline"] is None else f"{r['roofline']['share']:.0%}",
            "; ".join(r["warnings"]),
        )
        for r in record["results"]
    )
    return Table("Results", f"Latency of one batch. {name_machine(record)}.", *_without_empty(columns, rows))


def _without_empty(
    columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return tuple(columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows)


def tabulate_ratios(record: Record) -> Table | None:
    """One row per ratio, without those of the baseline to itself; None if there are none."""
    rows = tuple(
        (
            f"{r['model']} {r['form']}",
            f"{r['baseline']} {r['baseline_form']}",
            r["backend"] + (f", {r['mode']}" if r["mode"] else ""),
            r["precision"],
            str(r["batch"]),
            f"{r['ratio']:.3f}",
            f"{r['low']:.3f} – {r['high']:.3f}",
            str(r["rounds"]),
        )
        for r in record["ratios"]
        if (r["model"], r["form"]) != (r["baseline"], r["baseline_form"])
    )
    if not rows:
        return None
    columns = ("model", "against", "backend", "precision", "batch", "ratio", "95 % interval", "rounds")
    return Table("Ratios", f"Median over the rounds. {name_machine(record)}.", columns, rows)


def tabulate_paper(record: Record) -> Table | None:
    """The models of the paper's table 4 by their speed here, torch fp32 at the largest batch, beside its own column.

    None if fewer than three of them were measured.
    """
    torch = [
        r
        for r in record["results"]
        if r["backend"].startswith("torch-") and r["precision"] == "fp32" and r["form"] == "deploy"
    ]
    largest = max((r["batch"] for r in torch), default=0)
    here: dict[str, float] = {}
    for r in torch:
        if r["batch"] == largest:
            here.setdefault(r["model"], r["images_per_sec"])
    if len(here.keys() & IMAGES_PER_SEC_1080TI.keys()) < 3:
        return None
    base, paper = here.get("ResNet-50"), IMAGES_PER_SEC_1080TI
    rows = tuple(
        (
            model,
            f"{speed:,.1f}",
            "" if base is None else f"{speed / base:.2f}",
            f"{paper[model]:,}" if model in paper else "",
            f"{paper[model] / paper['ResNet-50']:.2f}" if model in paper else "",
        )
        for model, speed in sorted(here.items(), key=lambda item: -item[1])
    )
    columns = ("model", "images/s here", "of ResNet-50", "images/s in the paper", "of ResNet-50")
    note = f"Here: {name_machine(record, ['torch-cpu' if torch[0]['backend'] == 'torch-cpu' else 'torch-cuda'])},"
    return Table(
        "Beside the paper", f"{note} torch fp32, batch {largest}. Paper: GTX 1080 Ti, batch 128.", columns, rows
    )


def summarize(record: Record, baseline: str) -> list[str]:
    """What a record shows, in a few sentences."""
    results = record["results"]
    models = len({r["model"] for r in results})
    lines = [
        f"{models} models, {len(results)} results, measured on {name_machine(record)} on {record['created'][:10]}."
    ]
    best: dict[Setting, dict[str, Any]] = {}
    for ratio in record["ratios"]:
        if ratio["baseline"] != baseline or ratio["model"] == baseline or ratio["form"] != "deploy":
            continue
        before = best.get(setting_of(ratio))
        if before is None or ratio["ratio"] > before["ratio"]:
            best[setting_of(ratio)] = ratio
    lines += [
        f"{name_setting(setting)}: {r['model']} is {r['ratio']:.2f} times as fast as {baseline}"
        f" ({r['low']:.2f} to {r['high']:.2f}), the most of all models."
        for setting, r in sorted(best.items())
    ]
    gains = [r["ratio"] for r in record["ratios"] if r["baseline_form"] == "training" and r["form"] == "deploy"]
    if gains:
        lines.append(f"Fusing makes the models {min(gains):.2f} to {max(gains):.2f} times as fast.")
    unstable = sum(1 for r in results if r["unstable"])
    if unstable:
        lines.append(f"{unstable} of {len(results)} results are unstable; the tables say which, and why.")
    return lines


def render_markdown(records: Sequence[Record], baseline: str) -> str:
    """Tables for a README: throughput with ratios, and the gain of fusing where it was measured."""
    parts: list[str] = []
    for record in records:
        for table in (tabulate_overview(record, baseline), tabulate_fusing(record)):
            if table is not None:
                parts += [*_markdown_rows(table), "", table.note, ""]
    return "\n".join(parts)


def _markdown_rows(table: Table) -> list[str]:
    lines = [table.columns, ("---", *["---:"] * (len(table.columns) - 1)), *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
