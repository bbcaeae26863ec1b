"""The runner of an engine, held to NVIDIA's rules by a simulated engine: streams side by side, memory, and closing."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers.engine_graphs import CLASSES, PIXELS
from helpers.engine_runs import FAULT, draw, expected, on_device, parts, read
from helpers.simulated_engine import SimulatedCuda, simulate

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.engine import runner as engine_runner
from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.engine.cuda.interface import DeviceArray
from repvgg_deploy.engine.runner import EngineRunner, _OwnedMemory
from repvgg_deploy.errors import DeployError
from repvgg_deploy.runtime.model import open_model


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("graphs", [False, True])
def test_batch_sizes_may_come_back_in_any_order(backend: Backend, streams: int, graphs: bool) -> None:
    loaded = simulate(backend)
    with EngineRunner(loaded, streams, graphs) as runner:
        for count in (8, 3, 8, 3, 20, 1, 0, 44, 8):
            images = draw(count, count)
            np.testing.assert_array_equal(runner.run(images)["logits"], expected(images))


@pytest.mark.slow
def test_closing_gives_everything_back_and_drops_the_engine(backend: Backend) -> None:
    loaded = simulate(backend)
    cuda, engine = parts(loaded)
    alive = weakref.ref(engine)
    del engine
    runner = EngineRunner(loaded, streams=2)
    runner.run(draw(20))
    runner.run_on_device(on_device(loaded, draw(2)))
    assert alive() is not None
    held = runner.batch_streams(draw(2))
    runner.close()
    runner.close()
    gc.collect()
    # Whoever still holds the runner, its streams and what was loaded holds no GPU memory with them.
    assert alive() is None
    assert len(held) == 2
    assert loaded.runtime is None
    assert {name: count for name, count in cuda.holds.items() if name != "memory"} == {}
    assert cuda.closed == 1
    with pytest.raises(DeployError, match="was closed"):
        runner.run(draw(1))


@pytest.mark.parametrize("also", [(), ("free",), ("free", "free_pinned", "destroy_graph", "destroy_stream")])
def test_a_fault_of_the_gpu_keeps_nothing_from_being_given_back(backend: Backend, also: tuple[str, ...]) -> None:
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    runner = EngineRunner(loaded, streams=2)
    runner.run(draw(20))
    given = {"free": 6, "free_pinned": 4, "destroy_graph": len(cuda.graphs), "destroy_stream": 2}
    assert given["destroy_graph"] >= 2
    cuda.fails = {"synchronize": FAULT, **{call: f"{call} fails too" for call in also}}
    cuda.calls.clear()
    with pytest.raises(DeployError, match=FAULT):
        runner.close()
    assert {call: cuda.calls.count(call) for call in given} == given
    assert loaded.engine is None
    assert cuda.closed == 1
    runner.close()


def test_closing_does_not_hide_the_error_that_led_to_it(backend: Backend) -> None:
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    runner = EngineRunner(loaded)
    runner.run(draw(3))
    cuda.fails = {"synchronize": FAULT, "free": FAULT}
    with pytest.raises(DeployError, match="what went wrong first"), runner:
        raise DeployError("what went wrong first")
    assert {"free_pinned", "free", "destroy_graph", "destroy_stream"} <= set(cuda.calls)
    assert cuda.closed == 1


@pytest.mark.parametrize("failing", ["create_stream", "allocate", "allocate_pinned"])
def test_a_runner_that_cannot_be_made_leaves_nothing(backend: Backend, failing: str) -> None:
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    cuda.fails = {failing: "the GPU has too little free memory"}
    with pytest.raises(DeployError, match="too little free memory"):
        EngineRunner(loaded, streams=2)
    assert not cuda.holds
    assert cuda.closed == 1


def test_no_streams_are_refused(backend: Backend) -> None:
    loaded = simulate(backend)
    with pytest.raises(DeployError, match="number of streams cannot be 0"):
        EngineRunner(loaded, streams=0)
    assert loaded.engine is None


def test_a_model_that_does_not_fit_its_options_keeps_no_engine(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    monkeypatch.setattr(engine_runner, "open_engine", lambda *_: EngineRunner(loaded))
    plan = tmp_path / "net.plan"
    plan.touch()
    assert open_model(plan).runner.batch is None
    with pytest.raises(DeployError, match=f"takes {PIXELS}x{PIXELS} pixels, not 64x64"):
        open_model(plan, PreprocessingOptions(size=(64, 64)))
    assert cuda.closed == 1


def test_what_the_library_warns_of_at_loading_is_told(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = simulate(backend)
    loaded.warnings = ("using an engine plan file across different models of devices",)
    monkeypatch.setattr(engine_runner, "open_engine", lambda *_: EngineRunner(loaded))
    (tmp_path / "net.plan").touch()
    assert open_model(tmp_path / "net.plan").notes == (f"{backend.name} warns: {loaded.warnings[0]}",)


def test_a_batch_beyond_the_profile_is_refused(backend: Backend) -> None:
    loaded = simulate(backend)
    with EngineRunner(loaded) as runner:
        for refused in (runner.batch_streams, lambda images: runner.run_on_device(on_device(loaded, images))):
            with pytest.raises(DeployError, match="takes batches from 1 to 8, not 9") as raised:
                refused(draw(9))
            assert "--batch-range" in raised.value.hint


def test_without_a_stream_the_input_is_waited_for(backend: Backend) -> None:
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    images = draw(2)
    with EngineRunner(loaded) as runner:
        array = on_device(loaded, np.zeros_like(images))
        # Another library's stream fills the array, and has not come to it.
        cuda.others.append(lambda: cuda.copy_to_device(array.pointer, images, 99))
        outputs = runner.run_on_device(array)
        np.testing.assert_array_equal(read(loaded, outputs["logits"]), expected(images))
        assert cuda.calls.index("synchronize_device") < len(cuda.calls) - 1


def test_with_a_stream_nothing_is_waited_for(backend: Backend) -> None:
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    with EngineRunner(loaded) as runner:
        array = on_device(loaded, draw(2))
        runner.run_on_device(array, stream=77)
        runner.run_on_device(array, stream=77)
        assert not [call for call in cuda.calls if call.startswith("synchronize")]


def test_a_run_in_another_stream_waits_for_the_last(backend: Backend) -> None:
    """They share a context and its memory, which must not be in use twice."""
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    with EngineRunner(loaded) as runner:
        array = on_device(loaded, draw(2))
        for stream in (77, 88, 77):
            runner.run_on_device(array, stream=stream)
        assert cuda.calls.count("synchronize_device") == 2
        runner.run_on_device(array)


@pytest.mark.slow
def test_an_array_that_outlives_the_gpu_library_goes_in_silence() -> None:
    cuda = SimulatedCuda()
    memory = _OwnedMemory(cuda, 16)
    cuda.fails["free"] = "driver shutting down"
    # Pytest makes an error of what `__del__` raises.
    del memory
    gc.collect()
    assert cuda.calls == ["allocate", "free"]


@pytest.mark.parametrize("given", ["images", "logits"])
def test_memory_that_does_not_start_where_kernels_want_it_is_refused(backend: Backend, given: str) -> None:
    loaded = simulate(backend)
    cuda, _ = parts(loaded)
    with EngineRunner(loaded) as runner:
        images = on_device(loaded, draw(2))
        outputs = {"logits": DeviceArray(cuda.allocate(4096), (2, CLASSES), np.dtype(np.float32))}
        runner.run_on_device(images, outputs)
        array = images if given == "images" else outputs["logits"]
        array.pointer += 64
        with pytest.raises(DeployError, match=f"memory of {given} starts 64 bytes after a multiple of 256") as raised:
            runner.run_on_device(images, outputs)
        assert "clone" in raised.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("stream", [77, None])
def test_a_context_stays_until_its_run_in_another_stream_is_done(backend: Backend, stream: int | None) -> None:
    loaded = simulate(backend)
    cuda, engine = parts(loaded)
    runner = EngineRunner(loaded)
    runner.run_on_device(on_device(loaded, draw(2)), stream=stream)
    assert bool(cuda.busy) is (stream is not None)
    runner.close()
    gc.collect()
    assert not engine.faults
    assert not cuda.busy


@pytest.mark.slow
def test_the_simulation_knows_the_fault_of_a_context_that_goes_too_early(backend: Backend) -> None:
    loaded = simulate(backend)
    _, engine = parts(loaded)
    runner = EngineRunner(loaded)
    runner.run_on_device(on_device(loaded, draw(2)), stream=77)
    runner._borrowing = None
    gc.collect()
    assert engine.faults == ["a context went while its run was in flight"]
    runner.close()
