"""Results for people (tables) and for machines (one JSON object)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 160


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, and nothing else."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; numbers to the right. In a pipe it is plain text that no terminal's width cuts."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) or row[index] in ("", "–") for row in rows)
        table.add_column(name, justify="right" if numeric and rows else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(_format(value)) for value in row))
    console().print(table)


def print_fields(values: Mapping[str, Any]) -> None:
    """One `name value` a line on stdout; what is None is left out."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if value is None or value == [] or value == {}:
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {_format(v)}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        print(f"{name.replace('_', ' '):{width}}  {_format(value)}")


def console() -> Console:
    """The console of stdout: the terminal's own width, or a fixed one in a pipe."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:,.8g}"
    return str(value)
