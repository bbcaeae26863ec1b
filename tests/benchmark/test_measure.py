"""The harness: it times what it should, in the order that it should, and adds nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from helpers.simulated_gpu import SimulatedGpu, SimulatedStream, SimulatedTime
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_deploy.benchmark import measure as harness
from repvgg_deploy.benchmark.measure import Label, Measurement, MeasureOptions, Query, Slice, measure_interleaved
from repvgg_deploy.benchmark.workloads import BlockingWorkload, StreamWorkload

LABEL = Label("net", "simulated", "1", "fp32", 8)
SHORT = MeasureOptions(warmup_s=0.0, min_iterations=1, min_duration_s=0.0, min_rounds=1, slice_s=0.0, settle_s=0.0)

# Pauses are pauses of the simulated clock, where a test looks at them.
measure = partial(harness.measure, sleep=lambda _: None)


def sleeper(clock: SimulatedTime, seconds: Iterator[float]) -> Callable[[], None]:
    def call() -> None:
        clock.now += next(seconds)

    return call


def steady(clock: SimulatedTime, seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[], None]:
    def call() -> None:
        clock.now += seconds
        if log is not None:
            log.append(name)

    return call


def blocking(
    label: Label, call: Callable[[], None], clock: Callable[[], float] = time.perf_counter
) -> BlockingWorkload:
    return BlockingWorkload(label, call, outputs=lambda: pytest.fail("a timed run"), clock=clock)


def named(name: str, batch: int = 8) -> Label:
    return replace(LABEL, model=name, batch=batch)


def test_calls_are_interleaved_and_the_warm_up_is_not_counted() -> None:
    clock, log = SimulatedTime(), []
    runs = {"a": steady(clock, 1.0, log, "a"), "b": steady(clock, 2.0, log, "b")}
    seconds = measure_interleaved(runs, rounds=3, warmup=2, clock=clock)
    assert log == ["a", "b"] * 5
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_interleaving_needs_a_round() -> None:
    with pytest.raises(ValueError, match="0 rounds"):
        measure_interleaved({}, rounds=0)


def test_a_slow_first_call_is_warm_up() -> None:
    clock = SimulatedTime()
    times = iter([50.0, 50.0] + [0.01] * 1000)
    workload = blocking(LABEL, sleeper(clock, times), clock)
    options = MeasureOptions(warmup_s=0.2, min_duration_s=1.0, settle_s=0.0)
    (result,) = measure([workload], options, clock=clock)
    assert result.latency.max == pytest.approx(10.0)


def test_workloads_take_turns_of_the_same_length() -> None:
    clock, log = SimulatedTime(), []
    workloads = [
        blocking(named("fast"), steady(clock, 0.010, log, "fast"), clock),
        blocking(named("slow"), steady(clock, 0.050, log, "slow"), clock),
    ]
    options = MeasureOptions(warmup_s=0.0, slice_s=0.1, min_duration_s=0.3, min_rounds=3, settle_s=0.0)
    fast, slow = measure(workloads, options, clock=clock)
    turn = ["fast"] * 10 + ["slow"] * 2
    assert log[-5 * len(turn) :] == turn * 5
    assert [len(part.queries) for part in fast.slices] == [10] * 5
    assert [len(part.queries) for part in slow.slices] == [2] * 5


@pytest.mark.parametrize(
    ("floors", "iterations", "rounds"),
    [
        ({"min_iterations": 40}, 40, 40),
        ({"min_duration_s": 2.0}, 20, 20),
        ({"min_rounds": 30}, 30, 30),
    ],
)
def test_every_floor_holds(floors: dict[str, float], iterations: int, rounds: int) -> None:
    clock = SimulatedTime()
    options = replace(SHORT, slice_s=0.1, **floors)
    (result,) = measure([blocking(LABEL, steady(clock, 0.1), clock)], options, clock=clock)
    assert iterations <= len(result.queries) <= iterations + 1
    assert rounds <= len(result.slices) <= rounds + 1


def test_the_slowest_floor_is_every_workloads_floor() -> None:
    clock = SimulatedTime()
    workloads = [blocking(LABEL, steady(clock, seconds), clock) for seconds in (0.001, 1.0)]
    results = measure(workloads, replace(SHORT, min_iterations=10), clock=clock)
    assert [len(result.slices) for result in results] == [10, 10]


def test_a_workloads_spinning_threads_are_given_time_to_stop() -> None:
    """A call leaves threads behind that slow down whatever runs within the next 50 ms."""
    clock = SimulatedTime()
    spinning = {"by": "", "until": 0.0}

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            disturbed = spinning["by"] not in ("", name) and clock.now < float(spinning["until"])
            clock.now += 0.06 if disturbed else 0.03
            spinning.update(by=name, until=clock.now + 0.05)

        return run

    def sleep(seconds: float) -> None:
        clock.now += seconds

    workloads = [blocking(named(name), call(name), clock) for name in "ab"]
    options = MeasureOptions(min_duration_s=0.5)
    for pause, slowest in ((0.1, 30.0), (0.0, 60.0)):
        results = harness.measure(workloads, replace(options, pause_s=pause), clock=clock, sleep=sleep)
        assert max(result.latency.max for result in results) == pytest.approx(slowest)


def test_short_queries_settle_before_they_count() -> None:
    clock = SimulatedTime()
    cold = [True]

    def call() -> None:
        clock.now += 0.012 if cold[0] else 0.002
        cold[0] = False

    def other() -> None:
        clock.now += 0.1
        cold[0] = True

    workloads = [blocking(named("a"), call, clock), blocking(named("b"), other, clock)]
    options = MeasureOptions(warmup_s=0.05, slice_s=0.02, min_duration_s=0.1, settle_s=0.02)
    assert measure(workloads, options, clock=clock)[0].latency.max == pytest.approx(2.0)
    unsettled = measure(workloads, replace(options, settle_s=0.0), clock=clock)[0]
    assert unsettled.latency.max == pytest.approx(12.0)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-4, 0.5), min_size=30, max_size=200))
def test_jittered_calls_give_their_true_percentiles(seconds: list[float]) -> None:
    clock = SimulatedTime(0.0)
    warm = 2
    times = iter([0.01] * warm + seconds)
    options = replace(SHORT, min_iterations=len(seconds), min_rounds=len(seconds))
    workload = blocking(LABEL, sleeper(clock, times), clock)
    (result,) = measure([workload], options, clock=clock)
    truth = 1e3 * np.array(seconds)
    found = result.latency
    for share, value in ((50, found.p50), (90, found.p90), (95, found.p95), (99, found.p99)):
        assert value == pytest.approx(np.percentile(truth, share), rel=1e-6, abs=1e-9)
    assert (found.min, found.max) == pytest.approx((truth.min(), truth.max()), rel=1e-6)
    assert found.mean == pytest.approx(truth.mean(), rel=1e-6)
    assert result.images_per_sec == pytest.approx(LABEL.batch * len(seconds) / sum(seconds), rel=1e-6)


def test_a_known_duration_is_measured_to_one_percent_on_the_real_clock() -> None:
    """The call keeps its own time: on a busy machine it may take longer than it means to."""
    true_ms: list[float] = []

    def spin() -> None:
        start = time.perf_counter()
        while time.perf_counter() < start + 0.005:
            pass
        true_ms.append(1e3 * (time.perf_counter() - start))

    options = MeasureOptions(warmup_s=0.05, min_duration_s=0.3, min_rounds=5, settle_s=0.0)
    (result,) = measure([blocking(LABEL, spin)], options)
    assert result.latency.p50 == pytest.approx(np.median(true_ms[-len(result.queries) :]), rel=0.01)
    assert result.latency.p50 >= 5.0


def test_images_per_second_are_the_gpus_where_the_gpu_limits() -> None:
    clock = SimulatedTime()
    stream = SimulatedStream(clock, compute_s=0.004, enqueue_s=0.0005)
    (result,) = measure([StreamWorkload(LABEL, [stream], SimulatedGpu(clock), clock=clock)], clock=clock)
    assert result.images_per_sec == pytest.approx(LABEL.batch / result.compute.p50 * 1e3, rel=0.02)
    assert result.compute.p50 == pytest.approx(4.0)
    assert not result.unstable


def test_a_full_queue_of_launches_is_no_slow_host() -> None:
    """Enqueuing waits for the GPU where a thousand launches are in flight: the harness must not come there."""
    clock = SimulatedTime()
    stream = SimulatedStream(clock, compute_s=0.0025, enqueue_s=0.0002, launches=60)
    (result,) = measure([StreamWorkload(LABEL, [stream], SimulatedGpu(clock), clock=clock)], clock=clock)
    assert result.enqueue is not None
    assert result.enqueue.max == pytest.approx(0.2)
    assert not result.unstable


def test_a_gpu_is_not_left_to_cool_between_turns() -> None:
    clock = SimulatedTime()
    streams = [SimulatedStream(clock, compute_s=0.004) for _ in range(2)]
    gpu = SimulatedGpu(clock)
    named_streams = zip("ab", streams, strict=True)
    workloads = [StreamWorkload(named(name), [stream], gpu, clock=clock) for name, stream in named_streams]
    pauses: list[float] = []
    measure(workloads, MeasureOptions(min_duration_s=0.3), clock=clock, sleep=pauses.append)
    assert pauses == []
    measure([*workloads, blocking(LABEL, steady(clock, 0.01), clock)], clock=clock, sleep=pauses.append)
    assert set(pauses) == {MeasureOptions().pause_s}


def test_the_machine_is_watched_after_every_round() -> None:
    clock = SimulatedTime()
    seen: list[float] = []
    workloads = [blocking(named(name), steady(clock, 0.01), clock) for name in "ab"]
    results = measure(workloads, SHORT, clock=clock, sleep=lambda _: None, watch=lambda: seen.append(clock.now))
    assert len(seen) == len(results[0].slices)
    assert all(later > earlier for earlier, later in pairwise(seen))


def test_a_host_that_limits_is_reported() -> None:
    clock = SimulatedTime()
    stream = SimulatedStream(clock, compute_s=0.001, enqueue_s=0.003)
    (result,) = measure([StreamWorkload(LABEL, [stream], SimulatedGpu(clock), clock=clock)], clock=clock)
    assert result.images_per_sec == pytest.approx(LABEL.batch / 0.003, rel=0.03)
    assert result.unstable
    assert any("host is the limit" in warning for warning in result.warnings)


def test_copies_are_part_of_the_latency_only_where_asked_for() -> None:
    clock = SimulatedTime()
    stream = SimulatedStream(clock, compute_s=0.004, copy_s=0.001)
    workloads = [StreamWorkload(LABEL, [stream], SimulatedGpu(clock), transfers, clock) for transfers in (False, True)]
    without, with_copies = measure(workloads, clock=clock)
    assert without.latency.p50 == pytest.approx(4.0)
    assert with_copies.latency.p50 == pytest.approx(6.0)
    assert with_copies.queries[0].h2d_ms == pytest.approx(1.0)
    assert with_copies.compute.p50 == pytest.approx(4.0)


def test_two_streams_run_side_by_side() -> None:
    clock = SimulatedTime()
    streams = [SimulatedStream(clock, compute_s=0.004) for _ in range(2)]
    (result,) = measure([StreamWorkload(LABEL, streams, SimulatedGpu(clock), clock=clock)], clock=clock)
    assert result.images_per_sec == pytest.approx(2 * LABEL.batch / 0.004, rel=0.05)


@pytest.mark.parametrize(("spread", "unstable"), [(0.01, False), (0.06, True)])
def test_a_varying_compute_time_is_unstable(spread: float, unstable: bool) -> None:
    times = [1.0 - spread, 1.0 + spread] * 50
    queries = [Query(n, n + ms / 1e3, ms) for n, ms in enumerate(times)]
    result = Measurement(LABEL, tuple(Slice((query,)) for query in queries))
    assert result.unstable is unstable


def test_ratios_are_taken_round_by_round() -> None:
    """The machine is slower and slower; both suffer alike, so the interval stays narrow."""
    rounds = np.linspace(1.0, 3.0, 20)
    fast = Measurement(LABEL, tuple(Slice((Query(0.0, 0.010 * r, 10 * r),)) for r in rounds))
    slow = Measurement(LABEL, tuple(Slice((Query(0.0, 0.025 * r, 25 * r),)) for r in rounds))
    ratio = fast.ratio_to(slow)
    assert ratio.value == pytest.approx(2.5)
    assert ratio.high - ratio.low < 1e-9
