"""Benchmark results as one HTML page, without any file beside it, and as a Markdown table."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from repvgg_deploy.benchmark.report.paper import IMAGES_PER_SEC_1080TI
from repvgg_deploy.benchmark.report.plots import Plot, draw_plots
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files import stage_files

Record = dict[str, Any]
Rows = list[list[str]]

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{border-bottom:1px solid #999}
figure{margin:1.2rem 0;break-inside:avoid}
figure img{max-width:100%;height:auto}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}
dt{font-weight:600}dd{margin:0 0 .4rem 0}
"""


def write_report(
    records: Sequence[Record], output: Path, plots: Path | None = None, baseline: str = "ResNet-50"
) -> list[Path]:
    """Write the page to `output`, the Markdown table beside it, and the plots to the folder `plots`.

    Returns the files that were written.

    Raises:
        DeployError: matplotlib is missing, or the files cannot be written; none is then.
    """
    written = [output, output.with_suffix(".md")]
    for path in written:
        if path.is_dir():
            raise DeployError(f"{path} is a directory", "give the name of the file to write: -o report.html")
    drawn = draw_plots(records, baseline)
    with ExitStack() as stack:
        staging = stack.enter_context(stage_files(output.absolute().parent))
        (staging / output.name).write_text(render_page(records, drawn, baseline), encoding="utf-8")
        (staging / written[1].name).write_text(render_markdown(records, baseline), encoding="utf-8")
        if plots is not None:
            staging = stack.enter_context(stage_files(plots.absolute()))
            for plot in drawn:
                (staging / f"{plot.name}.png").write_bytes(plot.png)
                (staging / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
            written += [plots / f"{plot.name}.{kind}" for plot in drawn for kind in ("png", "svg")]
    return written


def render_page(records: Sequence[Record], plots: Sequence[Plot], baseline: str) -> str:
    """The HTML of a report."""
    pictures = "".join(
        f'<figure><img alt="{html.escape(plot.title)}" src="data:image/png;base64,{_base64(plot.png)}"></figure>'
        for plot in plots
    )
    parts = [f'<h2>Plots</h2><div class="plots">{pictures}</div>'] if plots else []
    for record in records:
        parts.append(f"<h2>{html.escape(record['name'])}</h2>{_machine(record)}")
        parts.append(_table(RESULT_COLUMNS, result_rows(record)))
        if record["ratios"]:
            parts.append("<h3>Ratios</h3>" + _table(RATIO_COLUMNS, ratio_rows(record)))
        if paper_rows(record):
            parts.append("<h3>Beside the paper</h3>" + _table(PAPER_COLUMNS, paper_rows(record)))
    title = f"RepVGG benchmark, baseline {html.escape(baseline)}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _machine(record: Record) -> str:
    machine, method = record["machine"], record["method"]
    cpu = machine["cpu"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none"
    facts = {
        "Date": record["created"],
        "CPU": f"{cpu['model']}, {cpu['usable_cores']} cores, {' '.join(cpu['flags'])}",
        "GPU": gpus,
        "Versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "Method": ", ".join(f"{name} {value}" for name, value in method.items()),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>"


def _table(columns: Sequence[str], rows: Rows) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


RESULT_COLUMNS = (
    "model", "form", "backend", "precision", "batch", "images/s", "p50 ms", "p90", "p95", "p99", "runs",
    "share of peak", "note",
)  # fmt: skip


def result_rows(record: Record) -> Rows:
    """A row a result, as in the page."""
    return [
        [
            r["model"],
            r["form"] + (f", {r['mode']}" if r["mode"] else ""),
            f"{r['backend']} {r['backend_version']}",
            r["precision"],
            str(r["batch"]),
            f"{r['images_per_sec']:,.1f}",
            *(f"{r['latency_ms'][p]:,.2f}" for p in ("p50", "p90", "p95", "p99")),
            str(r["iterations"]),
            "" if r["roofline"] is None else f"{r['roofline']['share']:.0%}",
            "; ".join(r["warnings"]),
        ]
        for r in record["results"]
    ]


RATIO_COLUMNS = ("model", "against", "backend", "precision", "batch", "ratio", "interval", "rounds")


def ratio_rows(record: Record) -> Rows:
    """A row a ratio, as in the page."""
    return [
        [
            f"{r['model']} {r['form']}",
            f"{r['baseline']} {r['baseline_form']}",
            r["backend"] + (f", {r['mode']}" if r["mode"] else ""),
            r["precision"],
            str(r["batch"]),
            f"{r['ratio']:.3f}",
            f"{r['low']:.3f} – {r['high']:.3f}",
            str(r["rounds"]),
        ]
        for r in record["ratios"]
        if (r["model"], r["form"]) != (r["baseline"], r["baseline_form"])
    ]


PAPER_COLUMNS = ("model", "images/s here", "of ResNet-50", "images/s in the paper", "of ResNet-50")


def paper_rows(record: Record) -> Rows:
    """The models of the paper's table 4 by their speed here, torch fp32 at the largest batch, beside its own column."""
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
        return []
    base, paper = here.get("ResNet-50"), IMAGES_PER_SEC_1080TI
    return [
        [
            model,
            f"{speed:,.1f}",
            "" if base is None else f"{speed / base:.2f}",
            f"{paper[model]:,}" if model in paper else "",
            f"{paper[model] / paper['ResNet-50']:.2f}" if model in paper else "",
        ]
        for model, speed in sorted(here.items(), key=lambda item: -item[1])
    ]


def render_markdown(records: Sequence[Record], baseline: str) -> str:
    """A table for a README: a row a model, a column a way to run it; ratios to the baseline in brackets."""
    return "\n".join(_markdown_of(record, baseline) for record in records)


def _markdown_of(record: Record, baseline: str) -> str:
    results = [r for r in record["results"] if r["form"] == "deploy"]
    settings = sorted({_setting(r) for r in results})
    models = dict.fromkeys(r["model"] for r in results)
    speed = {(r["model"], _setting(r)): r["images_per_sec"] for r in reversed(results)}
    ratio = {
        (r["model"], _setting(r)): r for r in record["ratios"] if r["baseline"] == baseline and r["form"] == "deploy"
    }
    head = ["model", *(_name(setting) for setting in settings)]
    lines = [_row(head), _row(["---", *["---:"] * len(settings)])]
    for model in models:
        cells = [_cell(speed.get((model, s)), ratio.get((model, s)), model == baseline) for s in settings]
        lines.append(_row([model, *cells]))
    cpu = record["machine"]["cpu"]
    where = (
        ", ".join(gpu["name"] for gpu in record["machine"]["gpus"]) or f"{cpu['model']}, {cpu['usable_cores']} cores"
    )
    what = f"Images/s, in brackets relative to {baseline} with the 95 % interval" if ratio else "Images/s"
    note = f"{what}; {where}, {record['created'][:10]}."
    return "\n".join([*lines, "", note, "", *_fused_table(record)])


def _fused_table(record: Record) -> list[str]:
    """How many times as fast as its training form each model is; nothing where no training form was measured."""
    ratios = [r for r in record["ratios"] if r["baseline_form"] == "training" and r["form"] == "deploy"]
    if not ratios:
        return []
    settings = sorted({_setting(r) for r in ratios})
    cells = {(r["model"], _setting(r)): f"{r['ratio']:.2f} ({r['low']:.2f}–{r['high']:.2f})" for r in ratios}
    head = ["fused / training form", *(_name(setting) for setting in settings)]
    rows = [
        _row([model, *(cells.get((model, setting), "–") for setting in settings)])
        for model in dict.fromkeys(r["model"] for r in ratios)
    ]
    return [_row(head), _row(["---", *["---:"] * len(settings)]), *rows, ""]


def _name(setting: tuple[str, str, str, int]) -> str:
    backend, precision, mode, batch = setting
    return f"{backend} {precision}{', ' + mode if mode else ''}, batch {batch}"


def _setting(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["backend"], row["precision"], row["mode"], row["batch"]


def _cell(speed: float | None, ratio: dict[str, Any] | None, is_baseline: bool) -> str:
    if speed is None:
        return "–"
    text = f"{speed:,.1f}"
    if ratio is None or is_baseline:
        return text
    return f"{text} ({ratio['ratio']:.2f}, {ratio['low']:.2f}–{ratio['high']:.2f})"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
