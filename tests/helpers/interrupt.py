"""A command that a signal ends at some moment: what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_START_S = 30.0


@dataclass(frozen=True)
class Interrupted:
    """How a command ended that got `number` after `delay_s`; `left` is what stands in its folders afterwards."""

    number: signal.Signals
    delay_s: float
    seconds_to_end: float
    status: int
    stderr: str
    left: tuple[str, ...]

    def fault(self, results: Sequence[str]) -> str | None:
        """What is wrong with it, or None; `results` are the files of a command that was done already."""
        if self.status == 0:
            return None if set(results) == set(self.left) else f"status 0 and {self.left}"
        if self.status != 128 + self.number:
            return f"status {self.status}"
        if self.left:
            return f"left behind: {', '.join(self.left)}"
        if not self.stderr.endswith("\nAborted!\n") or "Traceback" in self.stderr:
            return f"stderr ends with {self.stderr[-200:]!r}"
        if self.seconds_to_end > 10:
            return f"took {self.seconds_to_end:.1f} s to end"
        return None


def _wait_for_handlers(pid: int) -> None:
    """Wait until the process handles SIGTERM, or has ended."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            return
        caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1 or "State:\tZ" in status:
            return
        time.sleep(0.002)


def _restore_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def interrupt(arguments: Sequence[str], folder: Path, number: signal.Signals, delay_s: float) -> Interrupted:
    """Run `repvgg-deploy` with `folder`/out as its only output and `folder`/tmp for temporary files; then a signal.

    The signal comes `delay_s` after the program's first lines: until then the interpreter itself starts, which a signal
    ends in the system's own way.
    """
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    environment = {**os.environ, "TMPDIR": str(scratch), "XDG_CACHE_HOME": str(folder / "cache")}
    # A shell lets what it starts in the background ignore Ctrl-C, and nohup a hangup, and with it what the tests start.
    process = subprocess.Popen(
        [sys.executable, "-m", "repvgg_deploy", *arguments], env=environment, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, preexec_fn=_restore_signals,
    )  # fmt: skip
    _wait_for_handlers(process.pid)
    time.sleep(delay_s)
    process.send_signal(number)
    sent = time.monotonic()
    try:
        _, stderr = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        _, stderr = process.communicate()
        stderr += "\n(hung, and was killed)\n"
    seconds = time.monotonic() - sent
    left = [str(path.relative_to(folder)) for part in ("out", "tmp") for path in sorted((folder / part).rglob("*"))]
    if (folder / "out").is_dir() and not left:
        left = ["out"]
    return Interrupted(number, delay_s, seconds, process.returncode, stderr, tuple(left))
