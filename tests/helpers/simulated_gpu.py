"""A GPU that runs on a simulated clock: streams, events, and a host that spends time to enqueue."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SimulatedTime:
    """Seconds that pass only where something says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class SimulatedEvent:
    at: float = 0.0


@dataclass
class SimulatedGpu:
    """Its events."""

    time: SimulatedTime = field(default_factory=SimulatedTime)

    def create_event(self) -> SimulatedEvent:
        return SimulatedEvent()

    def elapsed_ms(self, start: SimulatedEvent, end: SimulatedEvent) -> float:
        return 1e3 * (end.at - start.at)

    def synchronize_event(self, event: SimulatedEvent) -> None:
        self.time.now = max(self.time.now, event.at)


@dataclass
class SimulatedStream:
    """A stream: work begins when the host has enqueued it and all work before is done.

    A run is `launches` kernels, of which CUDA queues no more than `queue`: then enqueuing waits.
    """

    time: SimulatedTime
    compute_s: float
    enqueue_s: float = 0.0
    copy_s: float = 0.0
    free_at: float = field(default=0.0)
    launches: int = 1
    queue: int = 1000
    _ends: list[float] = field(default_factory=list)

    def _work(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.time.now) + seconds

    def upload(self) -> None:
        self._work(self.copy_s)

    def enqueue(self) -> None:
        self.time.now += self.enqueue_s
        self._ends = [end for end in self._ends if end > self.time.now]
        while (len(self._ends) + 1) * self.launches > self.queue:
            self.time.now = self._ends.pop(0)
        self._work(self.compute_s)
        self._ends.append(self.free_at)

    def download(self) -> None:
        self._work(self.copy_s)

    def record(self, event: SimulatedEvent) -> None:
        event.at = max(self.free_at, self.time.now)

    def synchronize(self) -> None:
        self.time.now = max(self.time.now, self.free_at)
