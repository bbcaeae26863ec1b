"""Timing: warm-up, floors, interleaving, and nothing between two readings of the clock but the work that is timed.

The rules are those of trtexec, TensorRT's own benchmark; `docs/method.md` explains each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from repvgg_deploy.artifacts import Array
from repvgg_deploy.benchmark.statistics import Ratio, TimeStatistics, compare_rates
from repvgg_deploy.progress import SILENT, Progress

Clock = Callable[[], float]
"""Monotonic time in seconds."""

MAX_VARIATION = 0.025
"""Beyond this coefficient of variation of the compute time a measurement is unstable (trtexec's limit)."""

MAX_ENQUEUE_SHARE = 0.8
"""Beyond this share of the compute time (medians) the host, which enqueues, limits the GPU (trtexec's limit)."""


@dataclass(frozen=True)
class Query:
    """One batch: when it began and ended, in seconds, and how long its parts took, in milliseconds.

    A backend that does all in one blocking call has only `compute_ms`.
    """

    start_s: float
    end_s: float
    compute_ms: float
    h2d_ms: float = 0.0
    d2h_ms: float = 0.0
    enqueue_ms: float | None = None

    @property
    def latency_ms(self) -> float:
        """Copy to the device, compute, copy back."""
        return self.h2d_ms + self.compute_ms + self.d2h_ms


@dataclass(frozen=True)
class Label:
    """What is measured: the model, how it is run, on how many images at a time, and of which height and width.

    `input_type` is that of a graph or an engine (uint8 is NHWC), `profile` an engine's smallest, best and largest
    batch. `notes` are what a reader of the figures should know.
    """

    model: str
    backend: str
    backend_version: str
    precision: str
    batch: int
    form: str = "deploy"
    mode: str = ""
    size: tuple[int, int] | None = None
    input_type: str | None = None
    profile: tuple[int, int, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def conditions(self) -> tuple[object, ...]:
        """What two models must have in common to be compared."""
        return self.backend, self.precision, self.mode, self.batch, self.size, self.input_type


class Workload(Protocol):
    """A model that is ready to be timed with one batch size."""

    @property
    def label(self) -> Label:
        """What it is."""

    @property
    def spins(self) -> bool:
        """Whether its own threads keep spinning on a core when they have no work."""

    def run(self, queries: int) -> list[Query]:
        """Run so many batches one after another and wait for the last; stages that can overlap do."""

    def outputs(self) -> list[Array]:
        """What the model gives for the batch, on the host: of a run that is not timed."""


@dataclass(frozen=True)
class MeasureOptions:
    """How long is measured.

    Attributes:
        warmup_s: of each workload, before anything counts.
        min_iterations, min_duration_s, min_rounds: floors; a workload's measurement ends when it has passed all.
        slice_s: one workload's turn, after which the next has its own; at least one query.
        pause_s: between two turns, where there are several workloads that compute on the CPU: threads of the workload
            before (ONNX Runtime's, and OpenMP's) wait for work by spinning, for some 50 ms, and would take a core from
            this one. A GPU gets no pause: it would cool, and its clocks would be higher than under steady load.
        settle_s: queries shorter than this are run, and dropped, for so long at the start of each turn: the caches
            hold what the workload before has used.
    """

    warmup_s: float = 0.2
    min_iterations: int = 10
    min_duration_s: float = 3.0
    min_rounds: int = 10
    slice_s: float = 0.1
    pause_s: float = 0.1
    settle_s: float = 0.02


@dataclass(frozen=True)
class Slice:
    """One workload's turn: the queries that were run one after another, or side by side on several streams."""

    queries: tuple[Query, ...]

    @property
    def seconds(self) -> float:
        """From the start of the first query to the end of the last."""
        return max(query.end_s for query in self.queries) - min(query.start_s for query in self.queries)


@dataclass(frozen=True)
class Measurement:
    """All that was seen of one workload, one slice per round."""

    label: Label
    slices: tuple[Slice, ...] = field(repr=False)

    @cached_property
    def queries(self) -> tuple[Query, ...]:
        """Of all rounds."""
        return tuple(query for part in self.slices for query in part.queries)

    @property
    def duration_s(self) -> float:
        """Seconds that were measured, without those of other workloads."""
        return sum(part.seconds for part in self.slices)

    @property
    def images_per_sec(self) -> float:
        """Images over the seconds measured."""
        return self.label.batch * len(self.queries) / self.duration_s

    @cached_property
    def latency(self) -> TimeStatistics:
        """Of a query: copies and compute."""
        return TimeStatistics.of([query.latency_ms for query in self.queries])

    @cached_property
    def compute(self) -> TimeStatistics:
        """Of a query's compute."""
        return TimeStatistics.of([query.compute_ms for query in self.queries])

    @cached_property
    def enqueue(self) -> TimeStatistics | None:
        """Of the host's work for a query; None for a blocking backend."""
        times = [query.enqueue_ms for query in self.queries if query.enqueue_ms is not None]
        return TimeStatistics.of(times) if times else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the measurement is unstable; empty for a stable one."""
        found = []
        if self.compute.cv > MAX_VARIATION:
            found.append(f"the compute time varies by {self.compute.cv:.1%}")
        if self.enqueue is not None and self.enqueue.p50 > MAX_ENQUEUE_SHARE * self.compute.p50:
            found.append("the host is the limit: enqueuing takes nearly as long as computing")
        return tuple(found)

    @property
    def unstable(self) -> bool:
        """Whether there is any of the `warnings`."""
        return bool(self.warnings)

    def ratio_to(self, baseline: Measurement) -> Ratio:
        """How many times as many images per second as `baseline`, which was measured in the same rounds."""
        mine, theirs = (
            ([float(m.label.batch * len(part.queries)) for part in m.slices], [part.seconds for part in m.slices])
            for m in (self, baseline)
        )
        return compare_rates(*mine, *theirs)


def measure(
    workloads: Sequence[Workload],
    options: MeasureOptions | None = None,
    progress: Progress = SILENT,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
    watch: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Measure all workloads side by side: A B C A B C …, one slice each, until every one has passed all floors.

    Args:
        workloads: each has its own warm-up first.
        options: see `MeasureOptions`.
        progress: receives the step `measuring`.
        clock: see `Clock`; of the warm-up only, the queries bring their own times.
        sleep: lets so many seconds pass.
        watch: called after every round, when the machine has just been at work.
    """
    options = options or MeasureOptions()
    pauses = len(workloads) > 1 and options.pause_s > 0 and any(workload.spins for workload in workloads)
    query_s = [_warm_up(workload, options.warmup_s, clock) for workload in workloads]
    counts = [max(1, round(options.slice_s / seconds)) if seconds > 0 else 1 for seconds in query_s]
    settling = [math.ceil(options.settle_s / s) if 0 < s < options.settle_s else 0 for s in query_s]
    slices: list[list[Slice]] = [[] for _ in workloads]
    done = 0.0
    while done < 1.0:
        for workload, count, dropped, taken in zip(workloads, counts, settling, slices, strict=True):
            if pauses:
                sleep(options.pause_s)
            if dropped:
                workload.run(dropped)
            taken.append(Slice(tuple(workload.run(count))))
        watch()
        done = min((_share_done(taken, options) for taken in slices), default=1.0)
        progress.step("measuring", min(done, 1.0), 1.0)
    return [Measurement(s.label, tuple(taken)) for s, taken in zip(workloads, slices, strict=True)]


def _warm_up(workload: Workload, seconds: float, clock: Clock) -> float:
    """Run the workload for so long, at least twice; the seconds that one query takes when it is warm."""
    start, queries = clock(), 1
    workload.run(1)
    while True:
        took = Slice(tuple(workload.run(queries))).seconds
        if clock() - start >= seconds:
            return took / queries
        queries = min(2 * queries, max(1, int(queries * seconds / 4 / took))) if took > 0 else 2 * queries


def _share_done(slices: Sequence[Slice], options: MeasureOptions) -> float:
    iterations = sum(len(part.queries) for part in slices)
    duration = sum(part.seconds for part in slices)
    shares = [iterations / max(options.min_iterations, 1), len(slices) / max(options.min_rounds, 1)]
    if options.min_duration_s > 0:
        shares.append(duration / options.min_duration_s)
    return min(shares)


def measure_interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
    pause_s: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of every call, by name: A B A B …, so that whatever slows the machine down slows all of them down.

    Args:
        runs: what is timed; a call returns when its work is done.
        rounds: timed calls of each, at least one.
        warmup: calls of each before, A B A B as well, whose times are dropped.
        clock: see `Clock`.
        pause_s: before every call, so that the threads of the one before have stopped spinning.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"{rounds} rounds after {warmup} warm-up rounds")
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if pause_s > 0:
                time.sleep(pause_s)
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds
