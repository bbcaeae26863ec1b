"""`--lock`, `--from` and `--provenance` of `export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from repvgg_deploy.cli.command import option_group
from repvgg_deploy.cli.config import given_options, set_defaults
from repvgg_deploy.cli.options import PATH

if TYPE_CHECKING:
    from repvgg_deploy.workflows.records import RecordsRequest

# Where files go, and what is written about them, makes no difference to their bytes.
_NOT_LOCKED = ("output", "junit", "lock", "provenance", "offline")
_CHECKPOINT = "ckpt"


def _read_lock(ctx: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Make the options of a lock file the defaults of the command that is about to be parsed."""
    if path is None or ctx.resilient_parsing:
        return path
    from repvgg_deploy.workflows.lock import read_lock

    options = dict(read_lock(path).options)
    checkpoint = options.pop(_CHECKPOINT, None)
    if not isinstance(checkpoint, str | None):
        raise click.UsageError(f"--from {path}: {_CHECKPOINT} is not the name of a file.", ctx)
    # Where files go is for whoever runs the command to say, not for a file that others may have written.
    misplaced = next((key for key in options if key.replace("_", "-") in _NOT_LOCKED), None)
    if misplaced is not None:
        raise click.UsageError(f"--from {path}: {misplaced} is no option of a lock file.", ctx)
    options = {key: value for key, value in options.items() if not _would_be_written(key, value)}
    set_defaults(ctx, options, f"--from {path}")
    if checkpoint is not None:
        ctx.default_map = {**(ctx.default_map or {}), _CHECKPOINT: checkpoint}
    return path


def _would_be_written(key: str, value: Any) -> bool:
    """Whether an option is a calibration cache that is not there: it makes no difference to the graphs."""
    # Not Path.exists(): it raises for names that no file can have.
    return key.replace("_", "-") == "calib-cache" and isinstance(value, str) and not os.path.exists(value)  # noqa: PTH110


records_input = option_group(
    "Input",
    click.option("--from", type=PATH, metavar="FILE", is_eager=True, callback=_read_lock,
                 help="Lock file of an earlier export, whose ONNX files are made again, byte for byte."),
)  # fmt: skip

records_output = option_group(
    "Output",
    click.option("--lock", type=PATH, metavar="FILE",
                 help="TOML file to record options, hashes of all inputs, and versions in, for --from."),
    click.option("--provenance", is_flag=True,
                 help="Also NAME.provenance.json: an in-toto statement of what made the files."),
)  # fmt: skip


def take_records(values: dict[str, Any], checkpoint: Path, labels: Path | None) -> RecordsRequest:
    """Remove these options from `values` and return them as one object, with the options of the running command."""
    from repvgg_deploy.workflows.records import RecordsRequest

    options = given_options(click.get_current_context())
    # A published checkpoint is named by --arch and --pretrained, wherever the cache is.
    named = {} if "pretrained" in options else {_CHECKPOINT: str(checkpoint)}
    locked = {**named, **{name: value for name, value in options.items() if name not in _NOT_LOCKED}}
    return RecordsRequest(locked, labels, values.pop("lock"), values.pop("from"), values.pop("provenance"))


def describe_records(records: RecordsRequest, statement: Path | None) -> dict[str, str]:
    """The files that were written, for JSON."""
    files = {"lock": records.lock, "provenance": statement}
    return {name: str(path) for name, path in files.items() if path is not None}
