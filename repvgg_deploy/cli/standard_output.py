"""Standard output that may be full or gone: the program says so, and does not end as if all had been printed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class OutputError(Exception):
    """Standard output takes no more; raised by whatever prints, and by nothing else."""


class CheckedStream:
    """A text stream whose failures are `OutputError`s; a reader that has gone away stays a `BrokenPipeError`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`; raise OutputError if it cannot be."""
        with _told_apart():
            return self._stream.write(text)

    def flush(self) -> None:
        """Write what is kept; raise OutputError if it cannot be."""
        with _told_apart():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has."""
        return getattr(self._stream, name)


@contextmanager
def _told_apart() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


@contextmanager
def checked_output() -> Iterator[None]:
    """Inside the block, what is printed reaches standard output, or OutputError is raised, at its end at the latest."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Closed before the program began; no file that is opened later may take its place.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    stream = sys.stdout
    sys.stdout = cast(TextIO, CheckedStream(stream))
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (OutputError, BrokenPipeError) as error:
        _discard_the_rest(stream)
        if isinstance(error, OutputError):
            raise
        # As click ends where nobody reads any more.
        sys.exit(1)
    finally:
        sys.stdout = stream


def _discard_the_rest(stream: TextIO) -> None:
    """Let what is still kept go nowhere: at its end the interpreter would try once more, and complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()
