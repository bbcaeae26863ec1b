"""What a command says while it runs, on standard error: lines, and below them one bar where that is a terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TextIO

from repvgg_deploy.files.printable import printable
from repvgg_deploy.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

_HEARTBEAT_S = 30.0
# Shorter steps would only flicker.
_SHOWN_AFTER_S = 0.3
# Of a note, in characters: names in a file may be of any length.
_LONGEST = 2000

Clock = Callable[[], float]


class Verbosity(Enum):
    """How much a command says while it runs."""

    QUIET = "warnings only"
    NORMAL = "notes and steps"
    VERBOSE = "notes and steps, with times"


@contextmanager
def show_progress(verbosity: Verbosity = Verbosity.NORMAL) -> Iterator[Progress]:
    """Show notes and steps on standard error until the block ends; nothing of a bar is left then.

    On a terminal one bar stands below the notes. In a pipe a step that takes long is a plain line every 30 seconds.
    With `Verbosity.VERBOSE` every line begins with the seconds that have passed.
    """
    start, quiet = time.monotonic(), verbosity is Verbosity.QUIET

    def words(text: str) -> str | None:
        text = printable(text, _LONGEST)
        if quiet and not text.startswith("warning:"):
            return None
        return f"[{time.monotonic() - start:7.2f} s] {text}" if verbosity is Verbosity.VERBOSE else text

    if quiet or not _is_live(sys.stderr):
        yield PlainProgress(sys.stderr, words, heartbeat_s=float("inf") if quiet else _HEARTBEAT_S)
        return
    with _live_progress(words) as live:
        yield live


def _is_live(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


@dataclass(frozen=True)
class _Step:
    """A step as it was last reported; `since` is when it began."""

    name: str
    done: float
    total: float
    since: float

    def seconds_left(self, now: float) -> float | None:
        """An estimate from the speed so far; None if there is no ground for one."""
        if self.total <= 0 or self.done <= 0 or now - self.since < 1.0:
            return None
        return (now - self.since) * (self.total - self.done) / self.done

    @property
    def amount(self) -> str:
        """`12 of 512`, or a share where the units are not whole ones; empty if the total is not known."""
        if self.total <= 0:
            return f"{self.done:,.0f}" if self.done >= 1 else ""
        if self.total == 1:
            return f"{self.done:.0%}"
        return f"{self.done:,.0f} of {self.total:,.0f}"


class _Steps:
    """The step that is under way, if any; a report only sets a reference, so that it may come from any thread."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.current: _Step | None = None

    def report(self, name: str, done: float, total: float) -> _Step:
        before = self.current
        since = before.since if before is not None and before.name == name else self.clock()
        step = _Step(name, done, total, since)
        self.current = None if 0 < total <= done else step
        return step


class PlainProgress:
    """Lines of text, as a log file wants them."""

    def __init__(
        self,
        stream: TextIO,
        words: Callable[[str], str | None] = lambda text: text,
        heartbeat_s: float = _HEARTBEAT_S,
        clock: Clock = time.monotonic,
    ) -> None:
        self._stream = stream
        self._words = words
        self._heartbeat_s = heartbeat_s
        self._steps = _Steps(clock)
        self._clock = clock
        self._last = clock()

    def note(self, text: str, /) -> None:
        """Print a line."""
        words = self._words(text)
        if words is not None:
            # A log that takes no more is no reason to fail.
            with suppress(OSError):
                print(words, file=self._stream, flush=True)
            self._last = self._clock()

    def step(self, name: str, done: float, total: float, /) -> None:
        """Print a line if nothing has been printed for long."""
        step, now = self._steps.report(name, done, total), self._clock()
        if now - self._last < self._heartbeat_s:
            return
        left = step.seconds_left(now)
        estimate = "" if left is None else f", about {format_seconds(left)} left"
        amount = f": {step.amount}" if step.amount else ""
        self.note(f"{name}{amount}, {format_seconds(now - step.since)} so far{estimate}")


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def _live_progress(words: Callable[[str], str | None]) -> Iterator[Progress]:
    """Notes above one live line, through one console, so that neither overwrites the other."""
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.spinner import Spinner
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stderr, highlight=False)
    steps = _Steps(time.monotonic)
    spinner = Spinner("dots")

    def render() -> RenderableType:
        step, now = steps.current, steps.clock()
        if step is None or now - step.since < _SHOWN_AFTER_S:
            return Text("")
        elapsed, left = format_seconds(now - step.since), step.seconds_left(now)
        times = elapsed if left is None else f"{elapsed}, about {format_seconds(left)} left"
        width = min(30, console.width // 4)
        bar = ProgressBar(total=step.total, completed=step.done, width=width) if step.total > 0 else spinner
        line = Table.grid(padding=(0, 1))
        line.add_row(Text(step.name), bar, Text(step.amount), Text(times, style="dim"))
        return line

    class LiveProgress:
        def note(self, text: str, /) -> None:
            shown = words(text)
            if shown is not None:
                style = "yellow" if text.startswith("warning:") else None
                with lock:
                    console.print(Text(shown, style=style or ""), soft_wrap=True)

        def step(self, name: str, done: float, total: float, /) -> None:
            steps.report(name, done, total)

    lock = threading.Lock()
    with Live(get_renderable=render, console=console, transient=True, refresh_per_second=8, redirect_stdout=False):
        yield LiveProgress()
