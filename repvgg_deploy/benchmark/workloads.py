"""Models as the workloads of a measurement: blocking calls on a CPU, streams with events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from repvgg_deploy.artifacts import Array
from repvgg_deploy.benchmark.measure import Clock, Label, Query, Workload
from repvgg_deploy.errors import VerificationError

IN_FLIGHT = 2
"""Queries on a stream at a time, as trtexec has them: one that runs, and the next."""


def require_numbers(model: str, outputs: Iterable[object]) -> None:
    """Raise VerificationError if a value is NaN or infinite: whatever the speed of such a model, it computes nothing.

    Raises:
        VerificationError: it names `model`.
    """
    floats = (each for each in outputs if isinstance(each, np.ndarray) and each.dtype.kind == "f" and each.size)
    # By the extremes, which take no memory of their own; NaN is both.
    if not all(np.isfinite(extreme) for values in floats for extreme in (values.min(), values.max())):
        raise VerificationError(
            f"{model} gives NaN or Inf, so its speed means nothing",
            "in FP16: values beyond 65504; compare it with its checkpoint: `verify`",
        )


def require_sound(workloads: Iterable[Workload]) -> None:
    """Raise VerificationError if one of the models gives NaN or Inf for its batch; each is run once.

    Raises:
        VerificationError: it names the model, and how it was run.
    """
    for workload in workloads:
        label = workload.label
        require_numbers(f"{label.model} ({label.form}, {label.precision}, {label.backend})", workload.outputs())


class BlockingWorkload:
    """A call that returns when the batch is done; what it takes is compute and latency alike.

    `outputs` runs the batch as well, and returns what the model gives for it.
    """

    def __init__(
        self,
        label: Label,
        call: Callable[[], object],
        outputs: Callable[[], Iterable[Array]],
        clock: Clock = time.perf_counter,
        spins: bool = True,
    ) -> None:
        self.label = label
        self.spins = spins
        self._call = call
        self._outputs = outputs
        self._clock = clock

    def run(self, queries: int) -> list[Query]:
        """Call so many times."""
        times: list[tuple[float, float]] = []
        for _ in range(queries):
            start = self._clock()
            self._call()
            times.append((start, self._clock()))
        return [Query(start, end, 1e3 * (end - start)) for start, end in times]

    def outputs(self) -> list[Array]:
        """What the model gives for the batch."""
        return list(self._outputs())


class Stream(Protocol):
    """A stream of a GPU with one model and its buffers; everything but `synchronize` only enqueues."""

    def upload(self) -> None:
        """The copy of the batch to the device."""

    def enqueue(self) -> None:
        """One run of the model."""

    def download(self) -> None:
        """The copy of the results to the host."""

    def record(self, event: Any) -> None:
        """The moment at which the stream comes here."""

    def synchronize(self) -> None:
        """Wait for all of it."""

    def outputs(self) -> list[Array]:
        """The results on the host, once a download is done."""


class EventTimer(Protocol):
    """Events of a GPU."""

    def create_event(self) -> Any:
        """An event that keeps the time."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that are over."""

    def synchronize_event(self, event: Any) -> None:
        """Wait for an event."""


class StreamWorkload:
    """Batches on one or more streams, each enqueued while the one before still runs; times are the GPU's own.

    A stream has `IN_FLIGHT` queries at a time: so the GPU always has the next batch at hand, and waits for the host
    only where enqueuing is slower than computing. More would fill CUDA's queue of launches, about a thousand, and then
    enqueuing waits for the GPU and seems as slow as computing.

    Args:
        label: what it is.
        streams: they take turns; buffers of one stream are used again by its next query.
        events: of the same GPU.
        transfers: whether the copies to and from the device are part of a query.
        clock: of the enqueue times.
    """

    spins = False

    def __init__(
        self,
        label: Label,
        streams: Sequence[Stream],
        events: EventTimer,
        transfers: bool = False,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.label = label
        self._streams = streams
        self._events = events
        self._transfers = transfers
        self._clock = clock
        self._pool: list[tuple[Any, Any, Any, Any]] = []

    def run(self, queries: int) -> list[Query]:
        """Enqueue so many batches, wait, and read the events."""
        while len(self._pool) < queries:
            self._pool.append(self._create_marks())
        base = self._clock()
        enqueue_ms = []
        in_flight = IN_FLIGHT * len(self._streams)
        for n in range(queries):
            if n >= in_flight:
                self._events.synchronize_event(self._pool[n - in_flight][3])
            enqueue_ms.append(self._enqueue(self._streams[n % len(self._streams)], self._pool[n]))
        for stream in self._streams:
            stream.synchronize()
        first = self._pool[0][0]
        return [self._read(base, first, marks, ms) for marks, ms in zip(self._pool, enqueue_ms, strict=False)]

    def outputs(self) -> list[Array]:
        """What the model gives for the batch, on every stream."""
        for stream in self._streams:
            stream.upload()
            stream.enqueue()
            stream.download()
        for stream in self._streams:
            stream.synchronize()
        return [values for stream in self._streams for values in stream.outputs()]

    def _create_marks(self) -> tuple[Any, Any, Any, Any]:
        """Events for before and after the upload, after the compute and after the download.

        Without copies there are two of them only: each costs the GPU about a microsecond.
        """
        begin, end = self._events.create_event(), self._events.create_event()
        if not self._transfers:
            return begin, begin, end, end
        return begin, self._events.create_event(), self._events.create_event(), end

    def _enqueue(self, stream: Stream, marks: tuple[Any, Any, Any, Any]) -> float:
        """One query; the milliseconds that the host spent on the run itself."""
        stream.record(marks[0])
        if self._transfers:
            stream.upload()
            stream.record(marks[1])
        start = self._clock()
        stream.enqueue()
        end = self._clock()
        stream.record(marks[2])
        if self._transfers:
            stream.download()
            stream.record(marks[3])
        return 1e3 * (end - start)

    def _read(self, base: float, first: Any, marks: tuple[Any, Any, Any, Any], enqueue_ms: float) -> Query:
        elapsed = self._events.elapsed_ms
        return Query(
            start_s=base + elapsed(first, marks[0]) / 1e3,
            end_s=base + elapsed(first, marks[3]) / 1e3,
            compute_ms=elapsed(marks[1], marks[2]),
            h2d_ms=elapsed(marks[0], marks[1]) if self._transfers else 0.0,
            d2h_ms=elapsed(marks[2], marks[3]) if self._transfers else 0.0,
            enqueue_ms=enqueue_ms,
        )
