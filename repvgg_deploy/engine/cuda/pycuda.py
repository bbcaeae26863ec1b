"""`Cuda` through `pycuda`, in the GPU's primary context, which TensorRT and torch use as well; it has no graphs."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pycuda.driver as driver
from numpy.typing import NDArray

from repvgg_deploy.engine.cuda.interface import out_of_memory
from repvgg_deploy.errors import DeployError

# CU_STREAM_NON_BLOCKING of cuda.h, which pycuda does not name.
_NON_BLOCKING = 1


@contextmanager
def _explaining(doing: str) -> Iterator[None]:
    """Inside the block, or the function that this decorates, pycuda's errors are the project's."""
    try:
        yield
    except driver.MemoryError as error:
        raise out_of_memory(doing) from error
    except driver.Error as error:
        raise DeployError(f"{doing}: CUDA says {error}", "`repvgg-deploy doctor` reports on the driver") from error


class PyCuda:
    """pycuda's driver API; see `repvgg_deploy.engine.cuda.interface.Cuda` for the contract of every method."""

    name = "pycuda"
    has_graphs = False

    def __init__(self) -> None:
        # pycuda frees what is no longer referred to: streams and memory live in these.
        self._streams: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}

    def close(self) -> None:
        """A no-op: the context is the process's, and is left when that ends."""

    def _stream(self, stream: int) -> Any:
        if stream not in self._streams:
            raise DeployError(
                "pycuda can neither wait for nor record in a stream that it did not make",
                "install cuda-python, or synchronize that stream with the library that made it",
            )
        return self._streams[stream]

    def allocate(self, size: int) -> int:
        """Through mem_alloc."""
        with _explaining(f"allocating {size} bytes on the GPU"):
            # As in `bindings`: CUDA refuses to allocate 0 bytes.
            memory = driver.mem_alloc(max(size, 1))
        self._memory[int(memory)] = memory
        return int(memory)

    @_explaining("freeing GPU memory")
    def free(self, pointer: int) -> None:
        """Through DeviceAllocation.free."""
        self._memory.pop(pointer).free()

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """Through pagelocked_empty, which returns its memory when the array goes."""
        with _explaining(f"page-locking {size} bytes"):
            array: NDArray[np.uint8] = driver.pagelocked_empty(max(size, 1), np.uint8)
        return array

    def free_pinned(self, array: NDArray[np.uint8]) -> None:
        """A no-op: the memory goes with its last array."""

    @_explaining("creating a stream")
    def create_stream(self) -> int:
        """A Stream that does not wait for the default stream."""
        stream = driver.Stream(_NON_BLOCKING)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    @_explaining("destroying a stream")
    def destroy_stream(self, stream: int) -> None:
        """The stream goes with its last reference."""
        self._streams.pop(stream).synchronize()

    @_explaining("copying to the GPU")
    def copy_to_device(self, pointer: int, array: NDArray[Any], stream: int) -> None:
        """Through memcpy_htod_async."""
        driver.memcpy_htod_async(pointer, array, self._stream(stream))

    @_explaining("copying from the GPU")
    def copy_to_host(self, array: NDArray[Any], pointer: int, stream: int) -> None:
        """Through memcpy_dtoh_async."""
        driver.memcpy_dtoh_async(array, pointer, self._stream(stream))

    @_explaining("running the engine")
    def synchronize(self, stream: int) -> None:
        """A failure of an earlier launch shows here."""
        self._stream(stream).synchronize()

    @_explaining("waiting for the GPU")
    def synchronize_device(self) -> None:
        """Through Context.synchronize; a failure of an earlier launch shows here."""
        driver.Context.synchronize()

    @_explaining("creating an event")
    def create_event(self) -> Any:
        """An Event with timing."""
        return driver.Event()

    @_explaining("recording an event")
    def record(self, event: Any, stream: int) -> None:
        """Through Event.record."""
        event.record(self._stream(stream))

    @_explaining("waiting for an event")
    def synchronize_event(self, event: Any) -> None:
        """Through Event.synchronize; a failure of an earlier launch shows here."""
        event.synchronize()

    @_explaining("timing")
    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Through Event.time_till."""
        self.synchronize_event(end)
        return float(start.time_till(end))

    def is_capturing(self, stream: int) -> bool:
        """PyCUDA cannot tell; another library may be capturing."""
        del stream
        return False

    def _refuse_graphs(self, *_: Any) -> Any:
        raise DeployError("pycuda does not support CUDA graphs", "install cuda-python, or turn graphs off")

    begin_capture = end_capture = abandon_capture = launch = destroy_graph = _refuse_graphs

    def leave(self) -> None:
        """At the end of the process: release everything and leave the context."""
        self._streams.clear()
        self._memory.clear()
        driver.Context.pop()


def open_library() -> PyCuda:
    """The first GPU's primary context, current in the main thread from the first call to the end of the process.

    Raises:
        DeployError: there is no GPU, its driver is too old, or this is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise DeployError(
            "pycuda runs engines in the main thread only: it aborts the process when a thread with a context ends",
            "install cuda-python, or open the engine in the main thread",
        )
    return _enter()


@cache
def _enter() -> PyCuda:
    """The one PyCuda of the process.

    pycuda aborts the process where a context is left on its stack, and wants contexts popped in the order of a stack.
    Pushed once and popped once, ours keeps to that, whichever engine is closed first or not at all. It is never
    detached: pycuda pushes a context to detach it, and leaves it there.
    """
    with _explaining("engines cannot run here"):
        driver.init()
        driver.Device(0).retain_primary_context().push()
    opened = PyCuda()
    atexit.register(opened.leave)
    return opened
