"""The command `pull`, and `--pretrained` of `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from repvgg_deploy.cli.command import Command, Outcome, option_group, show_progress
from repvgg_deploy.cli.options import PATH, output_options
from repvgg_deploy.cli.output import print_fields, print_table

_SOURCES = ("openmmlab", "holocron", "timm")

offline_option = option_group(
    "Input",
    click.option("--offline", is_flag=True, help="Ask no server: take a published checkpoint from the cache."),
)

pretrained_option = option_group(
    "Input",
    click.option("--pretrained", type=click.Choice(_SOURCES), metavar="|".join(_SOURCES),
                 help="Published checkpoint of --arch, in place of CKPT; see `pull`."),
)  # fmt: skip


@click.command(
    cls=Command,
    examples=(
        "repvgg-deploy pull openmmlab/B2",
        "repvgg-deploy pull timm/A0 -o checkpoints/",
        "repvgg-deploy pull --list",
    ),
)
@click.argument("name", required=False, metavar="[SOURCE/ARCH]")
@offline_option
@option_group(
    "Output",
    click.option("-o", "--output", type=PATH, metavar="PATH", help="Folder or file to copy it to."),
    click.option("--list", "listing", is_flag=True, help="Show all published checkpoints that are known."),
)
@output_options
def pull(name: str | None, output: Path | None, offline: bool, listing: bool) -> Any:
    """Fetch a published checkpoint by name, into the cache.

    SOURCE is openmmlab, holocron or timm. A download that stopped is continued. The file is held to its published
    sha256, or its first digits; where none is published, to that of the first download, which is recorded.
    """
    if listing == (name is not None):
        raise click.UsageError("Give the name of a checkpoint, as openmmlab/B2, or --list.")
    if name is None:
        return _list()
    from repvgg_deploy.workflows.pull import pull as fetch

    with show_progress() as progress:
        result = fetch(name, output, offline, progress)
    values = result.to_dict()
    return Outcome(values, lambda: print_fields(values))


def _list() -> Outcome:
    from repvgg_deploy.checkpoints.published import load_published

    files = load_published()
    rows = [
        {
            "name": file.name,
            "url": file.url,
            "classes": file.classes,
            "input_size": file.input_size,
            "bytes": file.bytes or None,
            "sha256": file.sha256 or None,
        }
        for file in files
    ]
    columns = ["name", "classes", "size px", "MB", "sha256", "address"]
    table = [
        [
            file.name,
            file.classes,
            file.input_size,
            f"{file.bytes / 1e6:.1f}" if file.bytes else "–",
            f"{file.sha256[:8]}…" if file.sha256 else "not published",
            file.url,
        ]
        for file in files
    ]
    return Outcome({"files": rows}, lambda: print_table(columns, table, shorten=("address",)), schema="pull-list")


def take_pretrained(values: dict[str, Any]) -> Path | None:
    """Remove `--pretrained` and `--offline` from `values`, and fetch the checkpoint; None if none is asked for.

    What its publisher says of it goes into `values`: its input size, and that Holocron's nets have more blocks than the
    architecture of their name.

    Raises:
        click.UsageError: no architecture is given.
        DeployError: it cannot be fetched.
    """
    source, offline = values.pop("pretrained"), values.pop("offline")
    if source is None:
        return None
    if values["arch"] is None:
        raise click.UsageError("--pretrained needs --arch NAME.")
    from repvgg_deploy.nets.cards import find_card
    from repvgg_deploy.workflows.pull import pull as fetch

    card = find_card(values["arch"])
    with show_progress() as progress:
        result = fetch(f"{source}/{card.name.removeprefix('RepVGG-')}", None, offline, progress)
        file = result.file
        if source == "holocron":
            progress.note("note: Holocron's nets have one more block per stage than the architecture of that name")
            values["arch"] = None
        if values["size"] is None and file.input_size != card.preprocessing.height:
            progress.note(f"note: {file.name} takes images of {file.input_size} px")
            values["size"] = (file.input_size, file.input_size)
            if values["resize"] is None and values["crop_ratio"] is None:
                values["resize"] = file.resize
    return result.path
