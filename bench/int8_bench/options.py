"""Options that several commands share, and the values that they become."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

Command = Callable[..., None]
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


@dataclass(frozen=True)
class Data:
    """A checkpoint, calibration and validation images, and the folder of the record."""

    checkpoint: Path
    calib: Path
    val: Path
    count: int
    output: Path


def data_options(command: Command) -> Command:
    """The options of `Data`, which the command gets as its first argument."""

    @functools.wraps(command)
    def run(checkpoint: Path, calib: Path, val: Path, count: int, output: Path, **options: Any) -> None:
        command(Data(checkpoint, calib, val, count, output), **options)

    options = (
        click.option("--checkpoint", type=FILE, required=True, metavar="CKPT", help="The net to quantize."),
        click.option("--calib", type=FOLDER, required=True, metavar="DIR", help="Calibration images."),
        click.option("--val", type=FOLDER, required=True, metavar="DIR", help="Labelled images: DIR/<class>/*."),
        count_option,
        output_option,
    )
    wrapped: Command = run
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def count_option(command: Command) -> Command:
    """How many calibration images are taken."""
    return click.option(
        "--count", type=COUNT, default=512, show_default=True, metavar="N", help="Calibration images to take."
    )(command)


def output_option(command: Command) -> Command:
    """Where the record goes."""
    return click.option(
        "-o",
        "--output",
        type=FOLDER,
        default=Path("bench/results"),
        show_default=True,
        metavar="DIR",
        help="Folder of the record.",
    )(command)


def recipes_option(*default: str) -> Callable[[Command], Command]:
    """Which recipes are measured; those of `default` unless some are named."""
    return click.option(
        "--recipe",
        "recipes",
        multiple=True,
        default=default,
        show_default=True,
        metavar="NAME|FILE",
        help="A recipe to measure; repeatable.",
    )


def every_option(command: Command) -> Command:
    """Which validation images are evaluated."""
    return click.option(
        "--every", type=COUNT, default=1, show_default=True, metavar="N", help="Evaluate every N-th image."
    )(command)


def cpu_note_option(command: Command) -> Command:
    """A remark for the record's part about the machine."""
    return click.option("--cpu-note", metavar="TEXT", help="What the CPU's name does not tell, for the record.")(
        command
    )
