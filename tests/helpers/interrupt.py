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

# Where the interpreter itself still starts, which this project's code has no part in.
EARLIEST_S = 0.15


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


def interrupt(arguments: Sequence[str], folder: Path, number: signal.Signals, delay_s: float) -> Interrupted:
    """Run `repvgg-deploy` with `folder`/out as its only output and `folder`/tmp for temporary files; then a signal."""
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    environment = {**os.environ, "TMPDIR": str(scratch), "XDG_CACHE_HOME": str(folder / "cache")}
    # A shell lets what it starts in the background ignore Ctrl-C, and with it what the tests start.
    process = subprocess.Popen(
        [sys.executable, "-m", "repvgg_deploy", *arguments], env=environment, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
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
