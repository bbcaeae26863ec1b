"""Rows of predictions read back from files that may be damaged or made by others: no value is trusted."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn

import msgspec
from msgspec import UNSET, Meta, UnsetType

from repvgg_deploy.files.printable import printable
from repvgg_deploy.serving.tables import import_pyarrow

Row = Mapping[str, Any]

# All outputs of the widest classifiers take less.
_LONGEST = 16 << 20
# Of Parquet, unpacked: a path has at most 4,096 bytes, an error quotes one.
_MOST_BYTES_PER_ROW = 1 << 16

_Class = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Float32 = Annotated[float, Meta(ge=-3.5e38, le=3.5e38)]


class RowError(Exception):
    """A file of predictions that this program did not write, or that was damaged."""


class _Prediction(msgspec.Struct, forbid_unknown_fields=True):
    """A row; see `Prediction.to_dict`."""

    path: str
    classes: list[_Class] | UnsetType = UNSET
    names: list[str] | UnsetType | None = UNSET
    scores: list[_Float32] | UnsetType = UNSET
    logits: list[_Float32] | UnsetType = UNSET
    features: list[_Float32] | UnsetType = UNSET


class _Broken(msgspec.Struct, forbid_unknown_fields=True):
    path: str
    error: str


def read_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The whole lines from where the file stands; a last one without its end is left out.

    Raises:
        RowError: a line is longer than any row.
    """
    while line := file.readline(_LONGEST):
        if line.endswith(b"\n"):
            yield line
        elif len(line) == _LONGEST:
            raise RowError("it has a line that is longer than any row")


def read_row(line: bytes, number: int) -> Row:
    """The row in a line of JSON, the `number`th of its file.

    Raises:
        RowError: it is not a row of predictions.
    """
    try:
        # Not msgspec's reader: a name that is not UTF-8 has lone surrogates.
        values = json.loads(line, parse_constant=_refuse)
        msgspec.convert(values, _Broken if isinstance(values, dict) and "error" in values else _Prediction)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise RowError(f"line {number} is not a row of predictions ({printable(str(error))})") from error
    if not isinstance(values, dict):
        raise AssertionError("a struct is a table")
    if len({len(values[key]) for key in ("classes", "names", "scores") if values.get(key) is not None}) > 1:
        raise RowError(f"line {number} has more classes than names or scores, or fewer")
    numbers = [values[key] for key in ("scores", "logits", "features") if key in values]
    # Integers may be of any size, and Arrow takes few of them for floats.
    if not ("error" in values or numbers) or any(type(value) is int for part in numbers for value in part):
        raise RowError(f"line {number} has no scores, or integers in their place")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def shape_of(row: Row) -> object:
    """The fields of a row and how many values each has; None for one with an error."""
    if "error" in row:
        return None
    return tuple(sorted((key, -1 if values is None else len(values)) for key, values in row.items() if key != "path"))


def read_names(path: Path, count: int) -> Iterator[tuple[str, bool]]:
    """The name in each row of a `.jsonl`, `.csv` or `.parquet` file, and whether it has an error.

    Of a table with another number of rows than `count` nothing but that number may be read.

    Raises:
        OSError, RowError: the file cannot be read, or is damaged.
    """
    ending = path.suffix.lower()
    if ending == ".parquet":
        yield from _read_table(path, count)
    elif ending == ".csv":
        yield from _read_csv(path)
    else:
        with path.open("rb") as file:
            for number, line in enumerate(read_lines(file), 1):
                row = read_row(line, number)
                yield row["path"], "error" in row


def _read_csv(path: Path) -> Iterator[tuple[str, bool]]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            for row in csv.DictReader(_bounded(file)):
                name = row.get("path")
                if name is None:
                    raise RowError("a row has no path")
                yield name, bool(row.get("error"))
        except (csv.Error, UnicodeDecodeError) as error:
            raise RowError(printable(str(error))) from error


def _bounded(file: IO[str]) -> Iterator[str]:
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise RowError("it has a line that is longer than any row")
        yield line


def _read_table(path: Path, count: int) -> Iterator[tuple[str, bool]]:
    arrow = import_pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            about = file.metadata
            groups = [about.row_group(index) for index in range(about.num_row_groups)]
            columns = [group.column(index) for group in groups for index in range(group.num_columns)]
            needed = sum(c.total_uncompressed_size for c in columns if c.path_in_schema in ("path", "error"))
            if about.num_rows != count:
                return
            if needed > _MOST_BYTES_PER_ROW * (count + 1):
                raise RowError(f"its names claim to unpack to {needed} bytes")
            rows = file.read(columns=["path", "error"]).to_pylist()
    except (arrow.ArrowException, KeyError, ValueError, TypeError, MemoryError) as error:
        raise RowError(printable(str(error) or type(error).__name__)) from error
    for row in rows:
        if not isinstance(row.get("path"), str):
            raise RowError("a row has no path")
        yield row["path"], row.get("error") is not None
