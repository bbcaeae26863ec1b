"""Files of predictions that appear when they are whole, and the journal that an interrupted run continues from."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.printable import dump_json
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.serving.tables import as_text, import_pyarrow, make_table, prediction_schema
from repvgg_deploy.workflows.prediction_rows import Row, RowError, read_lines, read_names, read_row, shape_of

_START_OVER = "leave --resume out to start over, or choose another -o"
# Rows per row group of a Parquet file; one group is in memory at a time.
_ROW_GROUP = 4096


def encode_row(row: Row) -> bytes:
    """A row as a line of JSON Lines; a file's name that is not UTF-8 has escapes for what is not."""
    return dump_json(row).encode() + b"\n"


class Journal:
    """The finished rows of a run, one JSON object per line, in `FILE.partial` until FILE is whole.

    Its first line says what the run is; each row is written by one call after its batch is finished. A line that a
    killed process left half-written is removed when the journal is opened again; any other damage is an error.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], resume: bool) -> None:
        """Open the journal of `output`: with `resume` as it is, else empty.

        Raises:
            DeployError: it cannot be written, is damaged, belongs to another model or to other options, or is in use.
        """
        self.path = _journal_of(output)
        self._places: dict[str, tuple[int, int]] = {}
        self._written = 0
        self._shape: object = None
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            # Whoever may write to the folder could lead the rows to a file of the user's with a link.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise DeployError(f"cannot write {self.path}: {error.strerror}", "choose another -o") from error
        # Without a buffer a row that was appended is in the file, whenever the process is killed.
        self._file: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DeployError(f"{self.path} is a pipe or a device", "remove it, or choose another -o")
            self._lock()
            header = encode_row({"run": dict(identity)})
            if resume:
                self._recover(header)
            else:
                self._file.truncate(0)
            if self._file.seek(0, os.SEEK_END) == 0:
                self._write(header)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            # A second run would empty the file, or cut off the row that the first is writing.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DeployError(f"another process is writing {self.path}", "wait for it, or choose another -o") from error

    def _recover(self, header: bytes) -> None:
        """Find the whole rows, and cut off the half-written line that may follow the last of them."""
        end = 0
        with self.path.open("rb") as file:
            first = file.readline(len(header))
            if not header.startswith(first):
                raise DeployError(f"{self.path} was written with another model or with other options", _START_OVER)
            if first == header:
                end = len(header)
                try:
                    for number, line in enumerate(read_lines(file), 2):
                        self._add(read_row(line, number), end, line)
                        end += len(line)
                except RowError as error:
                    raise DeployError(f"{self.path} is damaged: {error}", _START_OVER) from error
        self._file.truncate(end)
        self._written = len(self._places)

    def _add(self, row: Row, place: int, line: bytes) -> None:
        """Note where a row is; those of one run have the same fields, and as many values in each."""
        shape = shape_of(row)
        if shape is not None:
            if self._shape not in (None, shape):
                raise RowError(f"the row of {row['path']} has other fields than those before it")
            self._shape = shape
        self._places.setdefault(row["path"], (place, len(line)))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows whose names are not there yet.

        Raises:
            DeployError: the disk is full, or failed.
        """
        place, parts = self._file.seek(0, os.SEEK_END), []
        for row in rows:
            if row["path"] in self._places:
                continue
            line = encode_row(row)
            try:
                self._add(row, place, line)
            except RowError as error:
                raise DeployError(f"{self.path} is not of this run: {error}", _START_OVER) from error
            place += len(line)
            parts.append(line)
        self._write(b"".join(parts))
        self._written = len(self._places)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise DeployError(
                f"cannot write {self.path}: {error.strerror}", "free some space and go on with --resume"
            ) from error

    def lines(self, names: Iterable[str]) -> Iterator[bytes]:
        """The rows of `names`, in their order."""
        with self.path.open("rb") as file:
            for name in names:
                place, size = self._places[name]
                file.seek(place)
                yield file.read(size)

    def close(self) -> None:
        """Release the journal, for another run to go on from."""
        self._file.close()

    def leave(self) -> str | None:
        """Close it for a run that ends early: what to tell the user. Without rows it is removed."""
        if not self._written:
            self.remove()
            return None
        self.close()
        return f"note: {self.path} keeps {self._written:,} finished images; --resume continues after them"

    def remove(self) -> None:
        """Delete the journal: its rows are in the output."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        self._file.close()


def write_predictions(output: Path, lines: Callable[[], Iterator[bytes]]) -> None:
    """Write rows, given as lines of JSON, in the format that the ending of `output` says; all of them or nothing.

    Raises:
        DeployError: the folder cannot be written to, or pyarrow is missing.
    """
    with stage_files(output.parent) as staging:
        _WRITERS[output.suffix.lower()](staging / output.name, lines)


def check_format(output: Path) -> None:
    """Raise DeployError if the ending of `output` is not that of a format that can be written here."""
    if output.suffix.lower() not in _WRITERS:
        raise DeployError(f"{output} has no known ending", f"one of {', '.join(_WRITERS)}")
    if output.suffix.lower() == ".parquet":
        import_pyarrow()
    mode = _mode_of(output)
    if mode is not None and not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise DeployError(f"{output} is {what}, so no file can take its place", "choose another -o")
    _mode_of(_journal_of(output))


def _journal_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _mode_of(output: Path) -> int | None:
    """What is in the place of the output; None for nothing, or a link to nothing.

    Raises:
        DeployError: no file can have that name, or the folder may not be entered.
    """
    try:
        return output.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return None
        reason = getattr(error, "strerror", None) or str(error)
        raise DeployError(f"cannot write {output}: {reason}", "choose another -o") from error


def _write_jsonl(path: Path, lines: Callable[[], Iterator[bytes]]) -> None:
    with path.open("wb") as file:
        file.writelines(lines())


def _write_csv(path: Path, lines: Callable[[], Iterator[bytes]]) -> None:
    columns = _csv_columns(lines())
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", *(f"{column}_{number}" for column, number in columns), "error"])
        for line in lines():
            row = json.loads(line)
            cells = (_cell(row, column, number) for column, number in columns)
            writer.writerow([row["path"], *cells, row.get("error", "")])


def _cell(row: Row, column: str, number: int) -> Any:
    values = row.get(_PLURALS[column])
    return values[number - _FIRST[column]] if values else ""


_PLURALS = {"class": "classes", "name": "names", "score": "scores", "logit": "logits", "feature": "features"}
# Ranks count from 1; logits and features are numbered as the model does.
_FIRST = {"class": 1, "name": 1, "score": 1, "logit": 0, "feature": 0}


def _csv_columns(lines: Iterator[bytes]) -> list[tuple[str, int]]:
    """The columns by the first row that has no error: `class_1 name_1 score_1 class_2 …`, then logits or features."""
    first: Row = next((row for line in lines if "error" not in (row := json.loads(line))), {})
    ranked = [column for column in ("class", "name", "score") if first.get(_PLURALS[column])]
    count = len(first.get("classes") or ())
    columns = [(column, rank) for rank in range(1, count + 1) for column in ranked]
    for column in ("logit", "feature"):
        columns += [(column, index) for index in range(len(first.get(_PLURALS[column]) or ()))]
    return columns


def _write_parquet(path: Path, lines: Callable[[], Iterator[bytes]]) -> None:
    arrow = import_pyarrow()
    rows = map(json.loads, lines())
    with arrow.parquet.ParquetWriter(path, prediction_schema()) as writer:
        while group := list(islice(rows, _ROW_GROUP)):
            writer.write_table(make_table(group))


_WRITERS: dict[str, Callable[[Path, Callable[[], Iterator[bytes]]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def count_errors(output: Path, names: Sequence[str]) -> int | None:
    """How many rows of `output` have an error; None unless it is there, with a row for each of `names`, in order.

    Raises:
        DeployError: the file is damaged.
    """
    if not output.is_file():
        return None
    try:
        rows = list(islice(read_names(output, len(names)), len(names) + 1))
    except (OSError, RowError) as error:
        raise DeployError(f"{output} cannot be read ({error})", "leave --resume out to write it anew") from error
    if [as_text(name) for name, _ in rows] != list(map(as_text, names)):
        return None
    return sum(broken for _, broken in rows)
