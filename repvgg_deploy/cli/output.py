"""Text for people on stdout: tables that fit the terminal without cutting anything, and lines of fields."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, chop_cells

from repvgg_deploy.files.printable import printable

_GAP = "  "
# A shortened name keeps at least so much of itself.
_SHORTEST_NAME = 20
_MISSING = ("", "–")
# Of a value, in characters: a file may hold text of any length.
_LONGEST = 20_000


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], shorten: Collection[str] = (), title: str | None = None
) -> None:
    """Print a table to stdout, as wide as the terminal; in a pipe as wide as it needs to be.

    Args:
        columns: their titles, with the unit.
        rows: one value per column; numbers stand on the right.
        shorten: titles of columns with long names, which may be shortened in the middle.
        title: a line above.
    """
    width = terminal_width()
    text = lay_out(columns, [[format_value(value) for value in row] for row in rows], width, shorten)
    lines = ([] if title is None else [title]) + text.lines
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    header = text.header + (title is not None)
    for number, line in enumerate(lines):
        print(f"\x1b[1m{line}\x1b[0m" if bold and number == header else line)


def terminal_width() -> int | None:
    """The columns of the terminal that stdout is; None for a pipe or a file, which have no width."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@dataclass(frozen=True)
class Layout:
    """A table as text; `header` is the number of the line with the titles."""

    lines: list[str]
    header: int


def lay_out(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, shorten: Collection[str] = ()
) -> Layout:
    """A table in `width` columns, or in as many as it needs if that is None.

    If it does not fit, what is the same in every row moves to a line above, then long names are shortened in the
    middle, then the last columns move to lines of their own below each row. Nothing else is ever cut.
    """
    shown = list(range(len(columns)))
    above: list[int] = []
    below: list[int] = []
    if width is not None and _width(columns, rows, shown) > width:
        if len(rows) > 1:
            above = [index for index in shown[1:] if len({row[index] for row in rows}) == 1]
            shown = [index for index in shown if index not in above]
        while len(shown) > 1 and _width(columns, _shorten(columns, rows, shown, width, shorten), shown) > width:
            below.insert(0, shown.pop())
        rows = _shorten(columns, rows, shown, width, shorten)
    lines = [] if width is None else _wrap(_facts(columns, rows[0], above), width) if above else []
    header = len(lines)
    widths = {index: _width(columns, rows, [index]) for index in shown}
    right = {index for index in shown if rows and all(_is_number(row[index]) for row in rows)}
    for number, row in enumerate([columns, *rows]):
        cells = [_align(row[index], widths[index], index in right) for index in shown]
        lines.append(_GAP.join(cells).rstrip())
        if number and below and width is not None:
            lines += [f"    {line}" for line in _wrap(_facts(columns, row, below), width - 4)]
    return Layout(lines, header)


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int]) -> int:
    widths = [max(cell_len(row[index]) for row in [columns, *rows]) for index in shown]
    return sum(widths) + len(_GAP) * (len(shown) - 1)


def _shorten(
    columns: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int], width: int, shorten: Collection[str]
) -> list[list[str]]:
    """The rows with the names of some columns as short as they must be for all columns to fit, and no shorter."""
    result = [list(row) for row in rows]
    for index in (index for index in shown if columns[index] in shorten):
        longest = max(cell_len(row[index]) for row in result)
        room = max(_SHORTEST_NAME, longest - max(0, _width(columns, result, shown) - width))
        for row in result:
            row[index] = shorten_middle(row[index], room)
    return result


def _facts(columns: Sequence[str], row: Sequence[str], indices: Sequence[int]) -> list[str]:
    return [f"{columns[index]} {row[index]}" for index in indices if row[index] not in _MISSING]


def shorten_middle(name: str, room: int) -> str:
    """`name` in at most `room` columns: its beginning and its end, which tell files apart, with `…` between."""
    if cell_len(name) <= room:
        return name
    tail = (room - 1) * 2 // 3
    head = room - 1 - tail
    return f"{chop_cells(name, head)[0]}…{chop_cells(name[::-1], tail)[0][::-1]}"


def _align(text: str, width: int, right: bool) -> str:
    padding = " " * (width - cell_len(text))
    return padding + text if right else text + padding


def _is_number(text: str) -> bool:
    return text in _MISSING or re.fullmatch(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?(e[-+]?\d+)?( ?%)?", text) is not None


def _wrap(facts: Sequence[str], width: int) -> list[str]:
    """Facts separated by commas, in lines of at most `width` columns; only a longer one is broken, between words."""
    lines: list[str] = []
    for number, fact in enumerate(facts):
        text = fact + ("," if number < len(facts) - 1 else "")
        if lines and cell_len(lines[-1]) + 1 + cell_len(text) <= width:
            lines[-1] += f" {text}"
            continue
        lines.append("")
        for word in text.split(" "):
            joined = f"{lines[-1]} {word}" if lines[-1] else word
            if cell_len(joined) <= width or not lines[-1]:
                lines[-1] = joined
            else:
                lines.append(word)
    return lines


def print_fields(values: Mapping[str, Any]) -> None:
    """Print one `name  value` per line to stdout; what is None or empty is left out."""
    shown = {printable(name): value for name, value in values.items() if value not in (None, "", [], {})}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        print(f"{name.replace('_', ' '):{width}}  {describe(value)}")


def describe(value: Any) -> str:
    """A value in one line: `name value, …` of a mapping, without what it does not know; the items of a list."""
    if isinstance(value, Mapping):
        if value.keys() == {"name", "dtype", "shape"}:
            return printable(f"{value['name']} ({', '.join(map(str, value['shape']))}) {value['dtype']}", _LONGEST)
        known = {k: v for k, v in value.items() if v not in (None, "", [], {})}
        return ", ".join(f"{printable(k).replace('_', ' ')} {describe(v)}" for k, v in known.items())
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping) for item in value):
            return "; ".join(map(describe, value))
        return printable(", ".join(map(str, value)), _LONGEST)
    return format_value(value)


def format_value(value: Any) -> str:
    """A value for a table: thousands separated, small numbers with three digits, yes or no."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:,.8g}"
    return printable(str(value), _LONGEST)
