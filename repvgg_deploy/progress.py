"""What long work says while it runs: lines to read, and how far a step is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Receives what a caller may want to show; it may be called from any thread, and returns at once.

    An exception that it raises ends the work that called it.
    """

    def note(self, text: str, /) -> None:
        """A line to read: what begins now, or, beginning with `note:` or `warning:`, what the user should know."""

    def step(self, name: str, done: float, total: float, /) -> None:
        """`done` of `total` units of the step `name` are finished; a `total` of 0 is not known.

        A step begins with its first call, and ends when `done` reaches `total` or when another step begins.
        """


class _Silent:
    def note(self, text: str, /) -> None:
        pass

    def step(self, name: str, done: float, total: float, /) -> None:
        pass


SILENT: Progress = _Silent()
"""Shows nothing; the default wherever a `Progress` is taken."""


def count_steps(progress: Progress, name: str, total: float) -> Callable[[float], None]:
    """A function that takes what has been finished since its last call, and reports the sum as the step `name`."""
    finished = 0.0

    def add(more: float) -> None:
        nonlocal finished
        finished += more
        progress.step(name, finished, total)

    return add
