"""What a benchmark refuses to time: models that give NaN or infinite values, on every backend alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.engine_graphs import rtx_backend
from helpers.engine_runs import draw
from helpers.simulated_engine import simulate, tensorrt_like

from repvgg_deploy.benchmark import opening
from repvgg_deploy.benchmark.cases import Case
from repvgg_deploy.benchmark.measure import Label
from repvgg_deploy.benchmark.run import BenchRequest, Group, run_benchmark
from repvgg_deploy.benchmark.workloads import BlockingWorkload, StreamWorkload, require_numbers, require_sound
from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.engine.runner import EngineRunner
from repvgg_deploy.errors import VerificationError

LABEL = Label("net.plan", "tensorrt", "10.13", "fp16", 8)
# The simulated engine doubles the values of its images, which float32 does not hold then.
TOO_LARGE = np.float32(2e38)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_value_that_is_no_number_is_enough(value: float, dtype: type) -> None:
    good, bad = np.zeros((2, 5), dtype), np.zeros((2, 5), dtype)
    require_numbers("net", [good])
    bad[1, 3] = value
    with pytest.raises(VerificationError, match="net gives NaN or Inf"):
        require_numbers("net", [good, bad])


def test_outputs_that_cannot_be_infinite_pass() -> None:
    require_numbers("net", [np.arange(3), np.empty((0, 5), np.float32), ["a sequence"], np.array(["text"])])


def test_a_blocking_model_is_named_with_how_it_runs() -> None:
    sound, broken = (
        BlockingWorkload(LABEL, lambda: pytest.fail("timed"), outputs=lambda value=value: [np.full((1, 3), value)])
        for value in (1.0, np.nan)
    )
    require_sound([sound])
    with pytest.raises(VerificationError, match=r"net.plan \(deploy, fp16, tensorrt\) gives NaN or Inf"):
        require_sound([sound, broken])


@pytest.fixture(params=[rtx_backend, tensorrt_like], ids=["tensorrt-rtx", "tensorrt"])
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param()
    return made


def test_an_engine_that_overflows_in_one_of_its_streams_is_an_error(backend: Backend) -> None:
    with EngineRunner(simulate(backend), streams=2) as runner:
        streams = runner.batch_streams(draw(4))
        workload = StreamWorkload(LABEL, streams, runner.cuda)
        require_sound([workload])
        runner.streams[1].images[2, 0, 0, 0] = TOO_LARGE
        with pytest.raises(VerificationError, match="gives NaN or Inf"):
            require_sound([workload])


def test_what_a_larger_batch_left_in_the_memory_of_an_engine_is_not_looked_at(backend: Backend) -> None:
    with EngineRunner(simulate(backend)) as runner:
        runner.run(np.full_like(draw(8), TOO_LARGE))
        require_sound([StreamWorkload(LABEL, runner.batch_streams(draw(4)), runner.cuda)])


def test_an_engine_is_not_timed_if_it_gives_no_numbers(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "net.plan"
    plan.touch()
    opened = lambda *_, streams, **__: EngineRunner(simulate(backend), streams)  # noqa: E731
    monkeypatch.setattr("repvgg_deploy.engine.runner.open_engine", opened)
    large = lambda shape, dtype: np.full(shape, TOO_LARGE, dtype)  # noqa: E731
    monkeypatch.setattr(opening, "seeded_inputs", large)
    monkeypatch.setattr("repvgg_deploy.benchmark.run.measure", lambda *_, **__: pytest.fail("timed"))
    group = Group("batch 2", (Case(str(plan)),), batch=2)
    with pytest.raises(VerificationError, match=rf"net.plan \(deploy, unknown, {backend.name}\) gives NaN or Inf"):
        run_benchmark(BenchRequest("test", (group,)))
