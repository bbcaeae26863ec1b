"""What a command says while it runs: plain lines in a pipe, one bar on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest

from repvgg_deploy.cli.progress import PlainProgress, Verbosity, format_seconds, show_progress
from repvgg_deploy.progress import count_steps


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_short_step_is_silent_in_a_pipe_and_a_long_one_is_a_line_every_half_minute() -> None:
    stream, clock = io.StringIO(), _Clock()
    progress = PlainProgress(stream, heartbeat_s=30, clock=clock)
    for second in range(100):
        clock.now = float(second)
        progress.step("evaluating", second + 1, 100)
    assert stream.getvalue().splitlines() == [
        "evaluating: 31 of 100, 30 s so far, about 1 min 7 s left",
        "evaluating: 61 of 100, 1 min 0 s so far, about 38 s left",
        "evaluating: 91 of 100, 1 min 30 s so far, about 9 s left",
    ]


def test_a_step_of_unknown_length_has_no_estimate() -> None:
    stream, clock = io.StringIO(), _Clock()
    progress = PlainProgress(stream, heartbeat_s=30, clock=clock)
    progress.step("calibrating", 0, 0)
    clock.now = 40.0
    progress.step("calibrating", 64, 0)
    assert stream.getvalue() == "calibrating: 64, 40 s so far\n"


def test_a_note_puts_the_next_line_off() -> None:
    stream, clock = io.StringIO(), _Clock()
    progress = PlainProgress(stream, heartbeat_s=30, clock=clock)
    progress.step("measuring", 0.0, 1.0)
    clock.now = 29.0
    progress.note("note: the machine is busy")
    clock.now = 31.0
    progress.step("measuring", 0.5, 1.0)
    assert stream.getvalue() == "note: the machine is busy\n"


def test_counting_reports_the_sum() -> None:
    told: list[tuple[str, float, float]] = []

    class Told:
        def note(self, text: str, /) -> None:
            raise AssertionError(text)

        def step(self, name: str, done: float, total: float, /) -> None:
            told.append((name, done, total))

    add = count_steps(Told(), "evaluating", 10)
    add(4)
    add(6)
    assert told == [("evaluating", 4, 10), ("evaluating", 10, 10)]


def test_quiet_leaves_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(Verbosity.QUIET) as progress:
        progress.note("reading a file")
        progress.note("warning: the images are few")
    assert capsys.readouterr().err == "warning: the images are few\n"


def test_verbose_tells_when(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(Verbosity.VERBOSE) as progress:
        progress.note("reading a file")
    assert re.fullmatch(r"\[ +0\.\d\d s\] reading a file\n", capsys.readouterr().err)


def test_times_are_in_words() -> None:
    assert [format_seconds(s) for s in (0.4, 59.4, 59.6, 200, 7500)] == [
        "0 s", "59 s", "1 min 0 s", "3 min 20 s", "2 h 5 min",
    ]  # fmt: skip


_LIVE = textwrap.dedent(
    """
    import time
    from repvgg_deploy.cli.progress import show_progress
    with show_progress() as progress:
        for done in range(1, 10):
            time.sleep(0.08)
            progress.step("measuring", done, 10)
        progress.note("opening the next model, whose name is longer than eighty columns: " + 30 * "x")
        for done in range(3):
            time.sleep(0.2)
            progress.step("building the engine", 0, 0)
        progress.note("warning: the end")
    print("result")
    """
)


def _in_a_terminal(script: str, **environment: str) -> str:
    """What a script writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=follower, stdout=follower, stderr=follower, close_fds=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment},
    ) as process:  # fmt: skip
        os.close(follower)
        parts = []
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:
                break
            if not part:
                break
            parts.append(part)
        assert process.wait() == 0
    os.close(leader)
    return b"".join(parts).decode()


def _screen(written: str) -> list[str]:
    """The lines that are left on the screen, for the few control sequences that rich uses."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]", written):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token.endswith("A"):
            row -= int(token[2:-1] or 1)
        elif token.endswith("K"):
            lines[row] = ""
        elif not token.startswith("\x1b"):
            lines[row] = lines[row].ljust(column)[:column] + token + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.slow
def test_on_a_terminal_notes_stay_and_bars_vanish() -> None:
    written = _in_a_terminal(_LIVE)
    assert "measuring" in written
    assert "9 of 10" in written
    assert "-:--:--" not in written
    opening, warning, result = _screen(written)
    assert opening == "opening the next model, whose name is longer than eighty columns: " + 30 * "x"
    assert warning == "warning: the end"
    assert result == "result"


@pytest.mark.slow
def test_no_color_means_no_colour() -> None:
    assert re.search(r"\x1b\[[0-9;]*33m", _in_a_terminal(_LIVE))
    assert not re.search(r"\x1b\[[0-9;]*3\dm", _in_a_terminal(_LIVE, NO_COLOR="1"))


@pytest.mark.slow
def test_a_dumb_terminal_gets_lines() -> None:
    written = _in_a_terminal(_LIVE, TERM="dumb")
    assert "\x1b" not in written
    assert "warning: the end" in written
