"""An engine and a CUDA library without a GPU, which hold their users to what NVIDIA documents.

Memory is host memory, and work is done when it is enqueued, except that of other libraries (`others`), which is done
when something waits for the whole device. What NVIDIA calls undefined raises `Undefined`.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from helpers.engine_graphs import CLASSES, PIXELS, rtx_backend
from repvgg_deploy.engine.backends import Backend, Capabilities
from repvgg_deploy.engine.loading import LoadedEngine
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.errors import DeployError

SCRATCH = 4096
ALIGNMENT = 256
IMAGES = Tensor("images", "float32", (-1, 3, PIXELS, PIXELS))
LOGITS = Tensor("logits", "float32", (-1, CLASSES))


class Undefined(AssertionError):
    """Something that NVIDIA's documentation forbids or calls undefined."""


@dataclass
class SimulatedGraph:
    context: SimulatedContext
    shape: tuple[int, ...]


class SimulatedCuda:
    """`Cuda` on host memory, without events; `fails` holds the methods that report a failure, and what they say."""

    name = "simulated"
    has_graphs = True

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: list[np.ndarray] = []
        self.streams: set[int] = set()
        self.graphs: list[SimulatedGraph] = []
        self.others: list[Callable[[], None]] = []
        self.capturing: dict[int, SimulatedGraph | None] = {}
        self.fails: dict[str, str] = {}
        self.calls: list[str] = []
        self.closed = 0
        self.busy: set[int] = set()
        self._numbers = itertools.count(1)

    @property
    def holds(self) -> dict[str, int]:
        """What was not given back."""
        kinds = {"memory": self.memory, "pinned": self.pinned, "streams": self.streams, "graphs": self.graphs}
        return {name: len(things) for name, things in kinds.items() if things}

    def _begin(self, call: str, stream: int = 0) -> None:
        if stream in self.capturing:
            raise Undefined(f"{call} in a stream that is being captured")
        self.calls.append(call)
        if call in self.fails:
            raise DeployError(self.fails[call])

    def close(self) -> None:
        self.closed += 1

    def allocate(self, size: int) -> int:
        self._begin("allocate")
        # As cudaMalloc: at a multiple of 256.
        array = np.zeros(max(size, 1) + ALIGNMENT, np.uint8)
        array = array[-array.ctypes.data % ALIGNMENT :][: max(size, 1)]
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, pointer: int) -> None:
        self._begin("free")
        del self.memory[pointer]

    def allocate_pinned(self, size: int) -> np.ndarray:
        self._begin("allocate_pinned")
        self.pinned.append(np.zeros(max(size, 1), np.uint8))
        return self.pinned[-1]

    def free_pinned(self, array: np.ndarray) -> None:
        self._begin("free_pinned")
        self.pinned = [other for other in self.pinned if other is not array]

    def create_stream(self) -> int:
        self._begin("create_stream")
        self.streams.add(next(self._numbers))
        return max(self.streams)

    def destroy_stream(self, stream: int) -> None:
        self._begin("destroy_stream")
        self.streams.remove(stream)

    def copy_to_device(self, pointer: int, array: np.ndarray, stream: int) -> None:
        self._begin("copy_to_device", stream)
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def copy_to_host(self, array: np.ndarray, pointer: int, stream: int) -> None:
        self._begin("copy_to_host", stream)
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def synchronize(self, stream: int) -> None:
        self._begin("synchronize", stream)
        self.busy.discard(stream)

    def synchronize_device(self) -> None:
        self._begin("synchronize_device")
        self.busy.clear()
        while self.others:
            self.others.pop(0)()

    def is_capturing(self, stream: int) -> bool:
        return stream in self.capturing

    def begin_capture(self, stream: int) -> None:
        self._begin("begin_capture")
        self.capturing[stream] = None

    def end_capture(self, stream: int) -> SimulatedGraph:
        graph = self.capturing.pop(stream)
        self._begin("end_capture")
        assert graph is not None
        self.graphs.append(graph)
        return graph

    def abandon_capture(self, stream: int) -> None:
        self._begin("abandon_capture")
        self.capturing.pop(stream, None)

    def launch(self, graph: SimulatedGraph, stream: int) -> None:
        self._begin("launch", stream)
        if graph not in self.graphs:
            raise Undefined("a destroyed graph was launched")
        if graph.context.shape != graph.shape:
            raise Undefined("a graph was replayed after its context changed the shape")
        graph.context.compute()

    def destroy_graph(self, graph: SimulatedGraph) -> None:
        self._begin("destroy_graph")
        self.graphs.remove(graph)


class SimulatedCache:
    """An IRuntimeCache: the batches whose kernels were compiled."""

    def __init__(self) -> None:
        self.batches: set[int] = set()

    def serialize(self) -> bytes:
        return b"kernels of " + bytes(sorted(self.batches)) if self.batches else b""

    def deserialize(self, blob: bytes) -> bool:
        fits = blob.startswith(b"kernels of ")
        if fits:
            self.batches = set(blob.removeprefix(b"kernels of "))
        return fits


class SimulatedConfig:
    """An IRuntimeConfig of TensorRT-RTX."""

    dynamic_shapes_kernel_specialization_strategy: Any = None
    strategy: Any = None
    cache: SimulatedCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> SimulatedCache:
        return SimulatedCache()

    def set_runtime_cache(self, cache: SimulatedCache) -> bool:
        self.cache = cache
        return True


class SimulatedContext:
    """Computes twice the first values of every image."""

    nvtx_verbosity: Any = None

    def __init__(self, engine: SimulatedEngine, strategy: Any, config: SimulatedConfig | None) -> None:
        self.engine = engine
        self._config = None if config is None else weakref.ref(config)
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.scratch: int | None = None
        self._stream: int | None = None
        self._needs_scratch = strategy.name == "USER_MANAGED"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == IMAGES.name
        self.shape = tuple(shape)
        return True

    def __del__(self) -> None:
        # A failure cannot be raised here.
        if self._stream in self.engine.cuda.busy:
            self.engine.faults.append("a context went while its run was in flight")

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        if pointer % ALIGNMENT:
            raise Undefined(f"the address of {name} is no multiple of {ALIGNMENT}")
        self.addresses[name] = pointer
        return name not in self.engine.refuses_addresses_of

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.scratch = pointer

    def is_stream_capturable(self, stream: int) -> bool:
        self.engine.asked_whether_capturable += 1
        return self.engine.is_capturable and stream in self.engine.cuda.streams

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.engine.cuda
        if self._needs_scratch and self.scratch not in cuda.memory:
            raise Undefined("a context ran without its memory")
        self._compile()
        if stream not in cuda.capturing:
            last, self._stream = self._stream, stream
            if last != stream and last in cuda.busy:
                raise Undefined("a context ran in two streams at once")
            cuda.busy.add(stream)
            self.compute()
            return True
        if self.engine.interrupt is not None:
            raise self.engine.interrupt
        cuda.capturing[stream] = SimulatedGraph(self, self.shape)
        return self.engine.can_be_captured

    def _compile(self) -> None:
        if self._config is None:
            return
        config = self._config()
        if config is None:
            raise Undefined("a context ran after its configuration went")
        assert config.cache is not None
        if self.shape[0] not in config.cache.batches:
            self.engine.compiled.append(self.shape[0])
            config.cache.batches.add(self.shape[0])

    def compute(self) -> None:
        batch = self.shape[0]
        images = self._array(IMAGES.name, self.shape)
        # A GPU reports no overflow either.
        with np.errstate(over="ignore"):
            self._array(LOGITS.name, (batch, CLASSES))[:] = 2 * images.reshape(batch, -1)[:, :CLASSES]

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses[name])
        return np.ctypeslib.as_array(values).reshape(shape)


@dataclass(eq=False)
class SimulatedEngine:
    cuda: SimulatedCuda
    takes_config: bool
    device_memory_size_v2: int = SCRATCH
    is_capturable: bool = True
    can_be_captured: bool = True
    interrupt: BaseException | None = None
    asked_whether_capturable: int = 0
    eager: list[bool] = field(default_factory=list)
    compiled: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    refuses_addresses_of: tuple[str, ...] = ()

    def create_runtime_config(self) -> SimulatedConfig:
        assert self.takes_config
        return SimulatedConfig()

    def create_execution_context(self, given: Any) -> SimulatedContext:
        assert isinstance(given, SimulatedConfig) is self.takes_config
        is_eager, strategy, config = False, given, None
        if isinstance(given, SimulatedConfig):
            is_eager = given.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
            strategy, config = given.strategy, given
        self.eager.append(is_eager)
        return SimulatedContext(self, strategy, config)


def tensorrt_like() -> Backend:
    """A backend whose module has what TensorRT-RTX shares with TensorRT, as far as running goes."""
    rtx = rtx_backend().module
    module = ModuleType("tensorrt_like")
    for name in ("ILogger", "ExecutionContextAllocationStrategy", "ProfilingVerbosity"):
        setattr(module, name, getattr(rtx, name))
    return Backend("tensorrt", "10.13.0", module, Capabilities(False, True, True, False, None))


def simulate(backend: Backend, profile: tuple[int, int, int] = (1, 4, 8)) -> LoadedEngine:
    """A loaded engine; its `cuda` and `engine` are simulated, and the library's module is what `backend` has."""
    cuda = SimulatedCuda()
    engine = SimulatedEngine(cuda, takes_config=backend.name == "tensorrt-rtx")
    path = Path("simulated.plan")
    return LoadedEngine(path, backend, cuda, object(), engine, None, (IMAGES,), (LOGITS,), profile)
