"""Running engines, held to NVIDIA's rules by a simulated engine: contexts, graphs, streams, and giving back."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.engine_graphs import CLASSES, PIXELS, rtx_backend
from helpers.simulated_engine import SCRATCH, SimulatedCuda, SimulatedEngine, Undefined, simulate, tensorrt_like

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.engine import log as messages
from repvgg_deploy.engine import runner as engine_runner
from repvgg_deploy.engine import stream as stream_module
from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.engine.cuda.interface import DeviceArray
from repvgg_deploy.engine.inspection import read_layers
from repvgg_deploy.engine.loading import LoadedEngine
from repvgg_deploy.engine.runner import EngineRunner, _OwnedMemory
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.gpus import FoundGpus, Gpu
from repvgg_deploy.runtime.model import open_model


@pytest.fixture(params=[rtx_backend, tensorrt_like], ids=["tensorrt-rtx", "tensorrt"])
def backend(request: pytest.FixtureRequest) -> Backend:
    make: Callable[[], Backend] = request.param
    return make()


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, PIXELS, PIXELS)).astype(np.float32)


def expected(images: np.ndarray) -> np.ndarray:
    return 2 * images.reshape(len(images), 3 * PIXELS * PIXELS)[:, :CLASSES]


def parts(loaded: LoadedEngine) -> tuple[SimulatedCuda, SimulatedEngine]:
    assert isinstance(loaded.cuda, SimulatedCuda)
    return loaded.cuda, loaded.engine


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("graphs", [False, True])
def test_batch_sizes_may_come_back_in_any_order(backend: Backend, streams: int, graphs: bool) -> None:
    loaded = simulate(backend)
    with EngineRunner(loaded, streams, graphs) as runner:
        for count in (8, 3, 8, 3, 20, 1, 0, 44, 8):
            images = draw(count, count)
            np.testing.assert_array_equal(runner.run(images)["logits"], expected(images))


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


def test_tensorrt_rtx_compiles_the_kernels_of_a_shape_before_they_are_captured() -> None:
    loaded = simulate(rtx_backend())
    _, engine = parts(loaded)
    with EngineRunner(loaded) as runner:
        runner.run(draw(3))
        runner.run_on_device(on_device(loaded, draw(2)))
    assert engine.eager == [True] * 3


def test_tensorrt_is_asked_for_nothing_that_only_tensorrt_rtx_has() -> None:
    loaded = simulate(tensorrt_like())
    _, engine = parts(loaded)
    with EngineRunner(loaded) as runner:
        runner.run(draw(3))
    # The simulated engine takes no configuration here.
    assert engine.eager == [False] * 2


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


FAULT = "CUDA says an illegal memory access was encountered"


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


def on_device(loaded: LoadedEngine, images: np.ndarray) -> DeviceArray:
    array = DeviceArray(loaded.cuda.allocate(images.nbytes), images.shape, images.dtype)
    loaded.cuda.copy_to_device(array.pointer, images, 0)
    return array


def read(loaded: LoadedEngine, array: DeviceArray) -> np.ndarray:
    values = np.empty(array.shape, array.dtype)
    loaded.cuda.copy_to_host(values, array.pointer, 0)
    return values


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


def test_an_array_that_outlives_the_gpu_library_goes_in_silence() -> None:
    cuda = SimulatedCuda()
    memory = _OwnedMemory(cuda, 16)
    cuda.fails["free"] = "driver shutting down"
    # Pytest makes an error of what `__del__` raises.
    del memory
    gc.collect()
    assert cuda.calls == ["allocate", "free"]


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu("NVIDIA H200", "9.0", 141 << 30)
    monkeypatch.setattr(messages, "find_gpus", lambda: FoundGpus((gpu,)))
    return gpu


@pytest.mark.parametrize("call", ["synchronize", "copy_to_host", "synchronize_device"])
def test_a_failure_on_a_gpu_that_is_not_listed_names_it(call: str, h200: Gpu) -> None:
    loaded = simulate(rtx_backend())
    cuda, _ = parts(loaded)
    with EngineRunner(loaded) as runner:
        array = on_device(loaded, draw(2))
        cuda.fails = {call: FAULT}
        with pytest.raises(DeployError, match=rf"{FAULT}; .* does not support the {h200.name}") as raised:
            runner.run_on_device(array) if call == "synchronize_device" else runner.run(draw(3))
        assert "--engine tensorrt" in raised.value.hint
        cuda.fails = {}


@pytest.mark.usefixtures("h200")
def test_on_a_listed_gpu_a_failure_is_told_as_it_is() -> None:
    loaded = simulate(tensorrt_like())
    cuda, _ = parts(loaded)
    with EngineRunner(loaded) as runner:
        cuda.fails = {"synchronize": FAULT}
        with pytest.raises(DeployError) as raised:
            runner.run(draw(3))
        assert raised.value.message == FAULT
        cuda.fails = {}


def test_the_layers_of_a_dynamic_batch_are_those_of_the_best_one(backend: Backend) -> None:
    class Inspector:
        execution_context: Any = None

        def get_engine_information(self, layout: Any) -> str:
            assert layout.name == "JSON"
            known = self.execution_context is not None and self.execution_context.shape[:1] == (4,)
            text = "Half" if known else "N/A due to dynamic shapes"
            return json.dumps({"Layers": [{"Name": "conv", "Inputs": [{"Format/Datatype": text}]}]})

    loaded = simulate(backend)
    if backend.name == "tensorrt":
        backend.module.LayerInformationFormat = rtx_backend().module.LayerInformationFormat
    loaded.engine.create_engine_inspector = Inspector
    assert [layer.precision for layer in read_layers(loaded)] == ["fp16"]


def test_the_kernels_of_a_batch_are_compiled_once_for_all_contexts_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []
    for _ in range(2):
        loaded = simulate(rtx_backend())
        _, engine = parts(loaded)
        with EngineRunner(loaded, streams=2) as runner:
            runner.run(draw(8 + 8 + 3))
            runner.run_on_device(on_device(loaded, draw(3)))
        compiled.append(engine.compiled)
    assert compiled == [[8, 3], []]
    (cache,) = tmp_path.rglob("*.runtime")
    # One that does not fit is replaced.
    cache.write_bytes(b"of another driver")
    loaded = simulate(rtx_backend())
    with EngineRunner(loaded) as runner:
        runner.run(draw(2))
    assert cache.read_bytes() == b"kernels of \x02"


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repvgg-deploy").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with EngineRunner(simulate(rtx_backend())) as runner:
        np.testing.assert_array_equal(runner.run(draw(2))["logits"], expected(draw(2)))


def test_contexts_name_no_layers_to_profilers(backend: Backend) -> None:
    with EngineRunner(simulate(backend)) as runner:
        assert runner.streams[0].context.nvtx_verbosity.name == "NONE"


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


def test_an_address_that_the_library_refuses_is_an_error(backend: Backend) -> None:
    loaded = simulate(backend)
    _, engine = parts(loaded)
    engine.refuses_addresses_of = ("logits",)
    with pytest.raises(DeployError, match=r"giving simulated\.plan the memory of logits failed"):
        EngineRunner(loaded)


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


def test_the_simulation_knows_the_fault_of_a_context_that_goes_too_early(backend: Backend) -> None:
    loaded = simulate(backend)
    _, engine = parts(loaded)
    runner = EngineRunner(loaded)
    runner.run_on_device(on_device(loaded, draw(2)), stream=77)
    runner._borrowing = None
    gc.collect()
    assert engine.faults == ["a context went while its run was in flight"]
    runner.close()
