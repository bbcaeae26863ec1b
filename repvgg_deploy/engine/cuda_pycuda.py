"""`Cuda` through `pycuda`, in the GPU's primary context, which TensorRT and torch use as well; it has no graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycuda.driver as driver
from numpy.typing import NDArray

from repvgg_deploy.errors import DeployError

# CU_STREAM_NON_BLOCKING of cuda.h, which pycuda does not name.
_NON_BLOCKING = 1


class PyCuda:
    """pycuda's driver API; see `repvgg_deploy.engine.cuda.Cuda` for the contract of every method."""

    name = "pycuda"
    has_graphs = False

    def __init__(self, context: Any) -> None:
        self._context = context
        # pycuda frees what is no longer referred to: streams and memory live in these.
        self._streams: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}

    def close(self) -> None:
        """Leave the primary context: pycuda aborts the process where one is left on its stack."""
        self._context.pop()
        self._context.detach()

    def _stream(self, stream: int) -> Any:
        if stream not in self._streams:
            raise DeployError(
                "pycuda can neither wait for nor record in a stream that it did not make",
                "install cuda-python, or synchronize that stream with the library that made it",
            )
        return self._streams[stream]

    def allocate(self, size: int) -> int:
        """Through mem_alloc."""
        try:
            memory = driver.mem_alloc(max(size, 1))
        except driver.MemoryError as error:
            raise DeployError(
                f"allocating {size} bytes on the GPU: the GPU has too little free memory",
                "a smaller batch; `nvidia-smi` shows who holds the memory",
            ) from error
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, pointer: int) -> None:
        """Through DeviceAllocation.free."""
        self._memory.pop(pointer).free()

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """Through pagelocked_empty, which returns its memory when the array goes."""
        array: NDArray[np.uint8] = driver.pagelocked_empty(max(size, 1), np.uint8)
        return array

    def free_pinned(self, array: NDArray[np.uint8]) -> None:
        """Nothing to do: the memory goes with its last array."""

    def create_stream(self) -> int:
        """A Stream that does not wait for the default stream."""
        stream = driver.Stream(_NON_BLOCKING)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        """The stream goes with its last reference."""
        self._streams.pop(stream).synchronize()

    def copy_to_device(self, pointer: int, array: NDArray[Any], stream: int) -> None:
        """Through memcpy_htod_async."""
        driver.memcpy_htod_async(pointer, array, self._stream(stream))

    def copy_to_host(self, array: NDArray[Any], pointer: int, stream: int) -> None:
        """Through memcpy_dtoh_async."""
        driver.memcpy_dtoh_async(array, pointer, self._stream(stream))

    def synchronize(self, stream: int) -> None:
        """A failure of an earlier launch shows here."""
        try:
            self._stream(stream).synchronize()
        except driver.Error as error:
            raise DeployError(f"running the engine: CUDA says {error}", "`repvgg-deploy doctor`") from error

    def create_event(self) -> Any:
        """An Event with timing."""
        return driver.Event()

    def record(self, event: Any, stream: int) -> None:
        """Through Event.record."""
        event.record(self._stream(stream))

    def wait_event(self, event: Any, stream: int) -> None:
        """Through Stream.wait_for_event."""
        self._stream(stream).wait_for_event(event)

    def synchronize_event(self, event: Any) -> None:
        """Through Event.synchronize; a failure of an earlier launch shows here."""
        event.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Through Event.time_till."""
        self.synchronize_event(end)
        return float(start.time_till(end))

    def destroy_event(self, event: Any) -> None:
        """The event goes with its last reference."""

    def _refuse_graphs(self, *_: Any) -> Any:
        raise DeployError("pycuda has no CUDA graphs", "install cuda-python, or turn graphs off")

    begin_capture = end_capture = abandon_capture = launch = destroy_graph = _refuse_graphs


def open_library() -> PyCuda:
    """Make the first GPU's primary context current in this thread, and give what works in it.

    Raises:
        DeployError: there is no GPU, or its driver is too old.
    """
    try:
        driver.init()
        device = driver.Device(0)
        context = device.retain_primary_context()
        context.push()
    except driver.Error as error:
        raise DeployError(f"engines cannot run here: {error}", "run them on a machine with an NVIDIA GPU") from error
    return PyCuda(context)
