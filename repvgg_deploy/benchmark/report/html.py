"""Benchmark results as one HTML page, without any file beside it, and as Markdown tables."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from repvgg_deploy.benchmark.report.plots import Plot, draw_plots
from repvgg_deploy.benchmark.report.tables import (
    Record,
    name_machine,
    render_markdown,
    summarize,
    tabulate_fusing,
    tabulate_overview,
    tabulate_paper,
    tabulate_ratios,
    tabulate_results,
)
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.staging import stage_files

_TEMPLATE = "page.html.j2"


def write_report(
    records: Sequence[Record], output: Path, plots: Path | None = None, baseline: str = "ResNet-50"
) -> list[Path]:
    """Write the page to `output`, the Markdown tables beside it, and the plots to the folder `plots`.

    Returns the files that were written.

    Raises:
        DeployError: matplotlib is missing, or the files cannot be written; none is written then.
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
    """The HTML of a report: what was found and the tables of throughput, then the plots, then everything else."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pictures = [{"title": plot.title, "data": base64.b64encode(plot.png).decode()} for plot in plots]
    machines = "; ".join(dict.fromkeys(name_machine(record) for record in records))
    return environment.get_template(_TEMPLATE).render(
        title=f"RepVGG benchmark against {baseline}, {machines}",
        parts=[_describe(record, baseline) for record in records],
        plots=pictures,
    )


def _describe(record: Record, baseline: str) -> dict[str, Any]:
    """What the template shows of a record."""
    machine = record["machine"]
    cpu = machine["cpu"]
    overview = [tabulate_overview(record, baseline), tabulate_fusing(record)]
    details = [tabulate_results(record), tabulate_ratios(record), tabulate_paper(record)]
    return {
        "name": record["name"],
        "summary": summarize(record, baseline),
        "overview": [table for table in overview if table is not None],
        "details": [table for table in details if table is not None],
        "facts": [
            ("Date", record["created"]),
            ("CPU", f"{cpu['model']}, {cpu['usable_cores']} cores, {' '.join(cpu['flags'])}"),
            ("GPU", ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none"),
            ("Versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
            ("Method", ", ".join(f"{name} {value}" for name, value in record["method"].items())),
        ],
    }
