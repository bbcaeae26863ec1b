"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from repvgg_deploy.cli.command import Command, Outcome, option_group
from repvgg_deploy.cli.options import PATH, output_options, path_argument
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.printable import printable


@click.command(
    cls=Command,
    examples=(
        "repvgg-deploy bench --suite bench/suites/cpu.toml -o cpu.json",
        "repvgg-deploy report cpu.json -o cpu.html --plots plots/",
    ),
)
@path_argument("results", nargs=-1, required=True, metavar="RESULT...")
@option_group(
    "Output",
    click.option("-o", "--output", type=PATH, required=True, metavar="FILE.html", help="Page to write."),
    click.option("--plots", type=PATH, metavar="DIR", help="Folder for the plots as PNG and SVG files."),
    click.option("--baseline", default="ResNet-50", metavar="NAME", help="Model that the ratios are relative to."),
)
@output_options
def report(results: tuple[Path, ...], output: Path, plots: Path | None, baseline: str) -> Any:
    """Write an HTML page with tables and plots from results of `bench -o`.

    The page is a single file. A Markdown table for a README is written beside it, as FILE.md.
    """
    from repvgg_deploy.benchmark.record import read_record
    from repvgg_deploy.benchmark.report.html import write_report

    if output.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"{output} does not end in .html.", param_hint="-o")
    records = [read_record(path) for path in results]
    known = {ratio["baseline"] for record in records for ratio in record["ratios"]}
    asked = click.get_current_context().get_parameter_source("baseline") is not ParameterSource.DEFAULT
    if asked and baseline not in known:
        names = ", ".join(sorted(known)) or "none"
        raise DeployError(f"the results have no ratio to {baseline!r}", f"they have ratios to: {names}")
    written = [str(path) for path in write_report(records, output, plots, baseline)]
    return Outcome({"files": written}, lambda: click.echo("\n".join(map(printable, written))))
