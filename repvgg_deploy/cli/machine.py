"""The commands about this machine: `demo` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from repvgg_deploy.cli.command import Command, Outcome, option_group, show_progress
from repvgg_deploy.cli.options import PATH, output_options
from repvgg_deploy.errors import DeployError, VerificationError


@click.command(cls=Command, examples=("repvgg-deploy demo", "repvgg-deploy demo -o demo"))
@option_group(
    "Output",
    click.option(
        "-o", "--output", type=PATH, metavar="DIR", help="Folder for the ONNX graphs and a picture of predictions."
    ),
)
@output_options
def demo(output: Path | None) -> Any:
    """Run the whole path on the embedded model, in about a minute, without a GPU."""
    from repvgg_deploy.cli.tables import print_demo
    from repvgg_deploy.workflows.demo import run_demo

    with show_progress() as progress:
        result = run_demo(output, progress)
    failure = None
    if result.failures:
        reasons = "; ".join(f"{form}: {reason}" for form, reason in result.failures.items())
        failure = VerificationError(
            f"not in the table: {reasons}", "`repvgg-deploy doctor` says what this machine can do"
        )
    return Outcome(result.to_dict(), lambda: print_demo(result), failure)


@click.command(cls=Command, examples=("repvgg-deploy doctor", "repvgg-deploy doctor --require tensorrt --require gpu"))
@option_group(
    "Limits",
    click.option("--require", multiple=True, metavar="PART", help="Part that must be usable: tensorrt, gpu, …"),
)
@output_options
def doctor(require: tuple[str, ...]) -> Any:
    """Show what this machine can do, and what is missing for the rest."""
    from repvgg_deploy.cli.tables import print_parts
    from repvgg_deploy.workflows.doctor import probe_machine, require_parts

    rows = probe_machine()
    failure = None
    try:
        require_parts(rows, require)
    except DeployError as error:
        failure = error
    return Outcome({"parts": [row.to_dict() for row in rows]}, lambda: print_parts(rows), failure)
