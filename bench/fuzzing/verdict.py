"""Whether what a case did is allowed: a clear error, wrong usage, a limit that was missed, or success."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fuzzing.child import CPU_SECONDS, MEMORY, Result
from fuzzing.mutations import FORGED

_STATUSES = {0: "success", 1: "error", 2: "usage", 3: "limit"}
# Control characters other than line ends and tabs, and those that reorder a line.
_DRIVES_TERMINAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
_NUMBERS = re.compile(r"-?\d[\d.,]*(e[+-]?\d+)?|\b[0-9a-f]{8,}\b")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|/\S+")


@dataclass(frozen=True)
class Verdict:
    """What a case came to: `outcome` is one of the allowed ones, or `failed`, and then `reason` says how."""

    outcome: str
    reason: str
    message: str


def judge(result: Result) -> Verdict:
    """The verdict on a result."""
    reason = next((text for text in _faults(result) if text), "")
    outcome = "failed" if reason else _STATUSES[result.status or 0]
    return Verdict(outcome, reason, _message(result))


def _faults(result: Result) -> list[str]:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    hints = [line for line in result.stderr.splitlines() if line.startswith("hint: ")]
    shown = result.stdout + result.stderr
    drives = _DRIVES_TERMINAL.search(shown)
    last = result.crash.strip().splitlines()[-1][:200] if result.crash else ""
    return [
        "it ran too long" if result.status is None else "",
        f"{result.cpu_s:.1f} s of CPU time" if result.cpu_s > CPU_SECONDS else "",
        f"{result.peak_bytes / 2**20:.0f} MiB of memory" if result.peak_bytes > MEMORY else "",
        f"canary: {result.violations[0]}" if result.violations else "",
        f"traceback: {last}" if last else "",
        f"ended by signal {-result.status}" if result.status is not None and result.status < 0 else "",
        f"exit status {result.status}" if result.status not in (None, *_STATUSES) else "",
        "a traceback on standard error" if "Traceback (most recent call last)" in result.stderr else "",
        f"a control character {drives[0]!r} is printed" if drives else "",
        "an error is forged" if any(line.startswith(f"error: {FORGED}") for line in shown.splitlines()) else "",
        f"{len(errors)} errors and {len(hints)} hints" if result.status == 1 and not _is_clear(errors, hints) else "",
        f"wrong output: {result.wrong}" if result.wrong else "",
    ]


def _is_clear(errors: list[str], hints: list[str]) -> bool:
    return len(errors) == 1 and len(hints) <= 1


def _message(result: Result) -> str:
    """The error without its numbers, names and paths, so that like ones are counted together."""
    for line in reversed(result.stderr.splitlines()):
        if line.startswith(("error: ", "Error: ")):
            return _NUMBERS.sub("N", _QUOTED.sub("…", line[7:]))[:160]
    return ""
