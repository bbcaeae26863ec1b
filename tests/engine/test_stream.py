"""Streams of engines, held to NVIDIA's rules by a simulated engine: contexts, captured graphs, and failed captures."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.engine_graphs import PIXELS, rtx_backend
from helpers.engine_runs import draw, expected, parts
from helpers.simulated_engine import SCRATCH, Undefined, simulate

from repvgg_deploy.engine import stream as stream_module
from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.engine.runner import EngineRunner


def test_the_simulation_knows_the_fault_of_one_context_for_two_graphs(backend: Backend) -> None:
    loaded = simulate(backend)
    runner = EngineRunner(loaded)
    runner.run(draw(8))
    runner.streams[0]._prepared[8].context.set_input_shape("images", (3, 3, PIXELS, PIXELS))
    with pytest.raises(Undefined, match="replayed after its context changed the shape"):
        runner.run(draw(8))


def test_a_short_last_batch_costs_no_second_capture(backend: Backend) -> None:
    loaded = simulate(backend)
    cuda, engine = parts(loaded)
    with EngineRunner(loaded) as runner:
        for _ in range(5):
            runner.run(draw(19))
        assert cuda.calls.count("end_capture") == 2
        assert cuda.calls.count("launch") == 15
        # Whether the stream can be captured is asked once a batch size, not at every run.
        assert engine.asked_whether_capturable == (2 if backend.name == "tensorrt-rtx" else 0)


def test_the_contexts_of_a_stream_share_their_memory_and_those_of_two_streams_do_not(backend: Backend) -> None:
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    with EngineRunner(loaded, streams=2) as runner:
        runner.run(draw(8 + 8 + 3 + 0))
        runner.run(draw(8 + 5))
        used = [{item.context.scratch for item in stream._prepared.values()} for stream in runner.streams]
        assert all(len(stream._prepared) >= 2 for stream in runner.streams)
        assert [len(scratch) for scratch in used] == [1, 1]
        assert used[0] != used[1]
        assert sum(len(array) == SCRATCH for array in cuda.memory.values()) == 2


def test_more_batch_sizes_than_there_are_graphs_run_without(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_GRAPHS", 2)
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    with EngineRunner(loaded) as runner:
        for count in (1, 2, 3, 4, 3, 2, 1, 4):
            images = draw(count, count)
            np.testing.assert_array_equal(runner.run(images)["logits"], expected(images))
        assert len(cuda.graphs) == 2
        assert set(runner.streams[0].without_graph) == {3, 4}


def test_without_graphs_there_is_one_context(backend: Backend) -> None:
    loaded = simulate(backend)
    cuda, engine = parts(loaded)
    with EngineRunner(loaded, graphs=False) as runner:
        for count in (8, 3, 8):
            runner.run(draw(count))
    assert len(engine.eager) == 1
    assert "begin_capture" not in cuda.calls


def test_an_engine_that_cannot_be_captured_runs_all_the_same() -> None:
    loaded = simulate(rtx_backend())
    cuda, engine = parts(loaded)
    engine.is_capturable = False
    with EngineRunner(loaded) as runner:
        images = draw(3)
        for _ in range(3):
            np.testing.assert_array_equal(runner.run(images)["logits"], expected(images))
        assert engine.asked_whether_capturable == 1
        assert "begin_capture" not in cuda.calls
        assert "cannot capture this engine" in runner.batch_streams(images)[0].without_graph


@pytest.mark.parametrize("failing", ["execute", "begin_capture", "end_capture"])
def test_after_a_failed_capture_the_engine_runs_without_a_graph(backend: Backend, failing: str) -> None:
    loaded = simulate(backend)
    cuda, engine = parts(loaded)
    if failing == "execute":
        engine.can_be_captured = False
    else:
        cuda.fails[failing] = "CUDA says no"
    with EngineRunner(loaded) as runner:
        images = draw(3)
        for _ in range(3):
            np.testing.assert_array_equal(runner.run(images)["logits"], expected(images))
        (reason,) = runner.streams[0].without_graph.values()
        assert ("running simulated.plan" if failing == "execute" else "CUDA says no") in reason
        assert not cuda.capturing
        assert cuda.calls.count("begin_capture") == 1
    assert not cuda.holds


def test_ctrl_c_in_a_capture_ends_the_capture(backend: Backend) -> None:
    loaded = simulate(backend)
    cuda, engine = parts(loaded)
    engine.interrupt = KeyboardInterrupt()
    with EngineRunner(loaded) as runner:
        with pytest.raises(KeyboardInterrupt):
            runner.run(draw(3))
        assert not cuda.capturing
        engine.interrupt = None
        images = draw(3)
        np.testing.assert_array_equal(runner.run(images)["logits"], expected(images))
    assert not cuda.holds


def test_a_capture_that_cannot_even_be_ended_does_not_hide_ctrl_c(backend: Backend) -> None:
    loaded = simulate(backend)
    cuda, engine = parts(loaded)
    engine.interrupt = KeyboardInterrupt()
    cuda.fails["abandon_capture"] = "nor does this work"
    runner = EngineRunner(loaded)
    with pytest.raises(KeyboardInterrupt):
        runner.run(draw(3))
    assert "abandon_capture" in cuda.calls
    # Taken for a failed capture, it would have gone on without a graph.
    assert not runner.streams[0].without_graph


def test_a_captured_batch_says_nothing_of_graphs(backend: Backend) -> None:
    with EngineRunner(simulate(backend)) as runner:
        assert runner.batch_streams(draw(3))[0].without_graph == ""
