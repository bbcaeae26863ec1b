"""Timing: warm-up, interleaving, and nothing between two readings of the clock but the call that is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Clock = Callable[[], float]
"""Seconds since any fixed moment, never going back."""


def measure_interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, by name: A B A B …, so that whatever slows the machine down slows all of them down.

    Args:
        runs: what is timed; a call returns when its work is done.
        rounds: timed calls of each, at least one.
        warmup: calls of each before, A B A B as well, whose times are dropped.
        clock: see `Clock`.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"{rounds} rounds after {warmup} warm-up rounds")
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds
