"""Running engines on real CUDA without TensorRT: the kernels are torch's, enqueued in the stream's own context.

Memory, page-locked memory, streams, events, captures, replays, failures and times are those of the GPU; what TensorRT
itself does in `execute_async_v3`, `test_gpu_engine.py` shows where it is installed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from repvgg_deploy.benchmark.measure import Label, MeasureOptions, measure
from repvgg_deploy.benchmark.workloads import StreamWorkload
from repvgg_deploy.engine.backends import Backend, Capabilities
from repvgg_deploy.engine.cuda.interface import DeviceArray, open_cuda
from repvgg_deploy.engine.loading import LoadedEngine
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.engine.runner import EngineRunner
from repvgg_deploy.errors import DeployError

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
    pytest.mark.filterwarnings("ignore"),
]
CLASSES, PIXELS, SCRATCH = 10, 32, 1 << 20
IMAGES = Tensor("images", "float32", (-1, 3, PIXELS, PIXELS))
LOGITS = Tensor("logits", "float32", (-1, CLASSES))


def as_tensor(pointer: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.as_tensor(DeviceArray(pointer, shape, np.dtype(np.float32)), device="cuda")


@dataclass
class TorchContext:
    """An execution context that computes twice the first values of every image, and one more."""

    engine: TorchEngine
    nvtx_verbosity: Any = None
    shape: tuple[int, ...] = ()
    addresses: dict[str, int] = field(default_factory=dict)
    scratch: int = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return name == IMAGES.name

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return pointer % 256 == 0

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size >= SCRATCH
        assert pointer % 256 == 0
        self.scratch = pointer

    def execute_async_v3(self, stream: int) -> bool:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                self._enqueue()
                if self.engine.breaks_capture and self.engine.cuda.is_capturing(stream):
                    # No capture allows to wait for the device.
                    torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def _enqueue(self) -> None:
        count = self.shape[0]
        logits = as_tensor(self.addresses[LOGITS.name], (count, CLASSES))
        # Through the scratch memory, which all contexts of a stream share.
        middle = as_tensor(self.scratch, (count, CLASSES)) if self.scratch else logits
        if self.engine.cycles:
            torch.cuda._sleep(self.engine.cycles)
        torch.mul(as_tensor(self.addresses[IMAGES.name], self.shape).flatten(1)[:, :CLASSES], 2, out=middle)
        torch.add(middle, 1, out=logits)


@dataclass
class TorchEngine:
    cuda: Any
    cycles: int = 0
    breaks_capture: bool = False
    device_memory_size_v2: int = SCRATCH

    def create_execution_context(self, strategy: Any) -> TorchContext:
        del strategy
        return TorchContext(self)


def load(largest: int = 8, **options: Any) -> tuple[LoadedEngine, TorchEngine]:
    module = ModuleType("torch_engine")
    severities = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "__init__": lambda _: None}
    module.ILogger = type("ILogger", (), severities)  # type: ignore[attr-defined]
    module.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])  # type: ignore[attr-defined]
    module.ProfilingVerbosity = enum.Enum("Verbosity", ["NONE"])  # type: ignore[attr-defined]
    backend = Backend("tensorrt", "0.0", module, Capabilities(False, True, True, False, None))
    engine = TorchEngine(open_cuda("cuda.bindings"), **options)
    path, profile = Path("torch.plan"), (1, 4, largest)
    return LoadedEngine(path, backend, engine.cuda, object(), engine, None, (IMAGES,), (LOGITS,), profile), engine


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, PIXELS, PIXELS)).astype(np.float32)


def expected(images: np.ndarray) -> np.ndarray:
    return 2 * images.reshape(len(images), 3 * PIXELS**2)[:, :CLASSES] + 1


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("graphs", [False, True])
def test_batches_of_every_size_take_turns(streams: int, graphs: bool) -> None:
    loaded, _ = load()
    with EngineRunner(loaded, streams, graphs) as runner:
        for count in (1, 8, 3, 20, 8, 0, 1, 3, 5, 8) * 3:
            images = draw(count, count)
            np.testing.assert_array_equal(runner(images), expected(images))
        if graphs:
            assert not any(stream.without_graph for stream in runner.streams)
            prepared = [item for stream in runner.streams for item in stream._prepared.values()]
            assert prepared
            assert all(item.graph is not None for item in prepared)


def test_a_broken_capture_is_told_and_leaves_everything_usable() -> None:
    loaded, engine = load(breaks_capture=True)
    with EngineRunner(loaded) as runner:
        for _ in range(3):
            np.testing.assert_array_equal(runner(draw(4)), expected(draw(4)))
        assert set(runner.streams[0].without_graph) == {4}
        engine.breaks_capture = False
        np.testing.assert_array_equal(runner(draw(5)), expected(draw(5)))
        assert set(runner.streams[0].without_graph) == {4}
    # Nothing of it is left in the process for torch to find.
    torch.cuda.synchronize()
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_memory_that_is_not_there_is_told_once() -> None:
    cuda = open_cuda("cuda.bindings")
    with pytest.raises(DeployError, match="too little free memory"):
        cuda.allocate(1 << 50)
    cuda.free(cuda.allocate(1 << 20))
    torch.cuda.synchronize()


@pytest.mark.parametrize("graphs", [False, True])
def test_the_benchmark_times_what_torch_times(graphs: bool) -> None:
    cycles = 2_000_000
    loaded, _ = load(cycles=cycles)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with EngineRunner(loaded, 1, graphs) as runner:
        label = Label("torch", "tensorrt", "0.0", "fp32", 8)
        (result,) = measure(
            [StreamWorkload(label, runner.batch_streams(draw(8)), runner.cuda)], MeasureOptions(min_duration_s=1.0)
        )
        torch.cuda._sleep(cycles)
        first.record()
        for _ in range(100):
            torch.cuda._sleep(cycles)
        last.record()
        last.synchronize()
        assert result.compute.p50 == pytest.approx(first.elapsed_time(last) / 100, rel=0.03)
        assert result.images_per_sec == pytest.approx(8 / result.compute.mean * 1e3, rel=0.03)
        assert not any("host" in warning for warning in result.warnings)
        with_copies = StreamWorkload(label, runner.batch_streams(draw(8)), runner.cuda, transfers=True)
        query = measure([with_copies], MeasureOptions(min_duration_s=0.2))[0].queries[-1]
        assert query.h2d_ms > 0 < query.d2h_ms


def test_torch_tensors_and_every_kind_of_stream_are_taken() -> None:
    loaded, _ = load()
    given = torch.from_numpy(draw(4)).cuda()
    torch.cuda.synchronize()
    with EngineRunner(loaded) as runner:
        for stream in (None, torch.cuda.Stream(), torch.cuda.default_stream(), torch.cuda.current_stream().cuda_stream):
            outputs = runner.run_on_device(given, stream=stream)
            torch.cuda.synchronize()
            found = torch.as_tensor(outputs["logits"], device="cuda").cpu().numpy()
            np.testing.assert_array_equal(found, expected(draw(4)))


def test_a_part_of_a_tensor_is_refused() -> None:
    loaded, _ = load()
    given = torch.zeros(1 + 4 * 3 * PIXELS**2, device="cuda")[1:].view(4, 3, PIXELS, PIXELS)
    with EngineRunner(loaded) as runner, pytest.raises(DeployError, match="multiple of 256"):
        runner.run_on_device(given)


def test_closing_waits_for_runs_in_streams_of_others() -> None:
    loaded, _ = load(cycles=200_000_000)
    stream = torch.cuda.Stream()
    runner = EngineRunner(loaded)
    given = torch.from_numpy(draw(4)).cuda()
    torch.cuda.synchronize()
    outputs = runner.run_on_device(given, stream=stream)
    assert not stream.query()
    runner.close()
    assert stream.query()
    del outputs


def test_closing_releases_all_memory() -> None:
    free = []
    for _ in range(6):
        loaded, _ = load(largest=256)
        runner = EngineRunner(loaded, 2)
        runner(draw(300))
        runner.close()
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[2] - free[-1] < 4 << 20
