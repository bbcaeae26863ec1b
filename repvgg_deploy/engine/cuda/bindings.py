"""`Cuda` through NVIDIA's `cuda.bindings` (package cuda-python): the CUDA runtime, so TensorRT's own context."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import numpy as np
from cuda.bindings import runtime
from numpy.typing import NDArray

from repvgg_deploy.engine.cuda.interface import out_of_memory
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.gpus import find_gpus


def check(returned: Any, doing: str) -> Any:
    """What a call returned besides its status: nothing, one value, or several.

    Raises:
        DeployError: the status is not success.
    """
    status, *values = returned
    if status == runtime.cudaError_t.cudaSuccess:
        return values[0] if len(values) == 1 else values
    if status == runtime.cudaError_t.cudaErrorMemoryAllocation:
        raise out_of_memory(doing)
    _, text = runtime.cudaGetErrorString(status)
    said = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    raise DeployError(f"{doing}: CUDA says {said} ({int(status)})", "`repvgg-deploy doctor` reports on the driver")


class CudaBindings:
    """The CUDA runtime API; see `repvgg_deploy.engine.cuda.interface.Cuda` for the contract of every method."""

    name = "cuda.bindings"
    has_graphs = True

    def close(self) -> None:
        """A no-op: the primary context stays, as torch's does."""

    def allocate(self, size: int) -> int:
        """Through cudaMalloc."""
        # An engine may need no scratch memory, and CUDA has no address for 0 bytes.
        return int(check(runtime.cudaMalloc(max(size, 1)), f"allocating {size} bytes on the GPU"))

    def free(self, pointer: int) -> None:
        """Through cudaFree."""
        check(runtime.cudaFree(pointer), "freeing GPU memory")

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """Through cudaHostAlloc."""
        flags = runtime.cudaHostAllocDefault
        pointer = int(check(runtime.cudaHostAlloc(max(size, 1), flags), f"page-locking {size} bytes"))
        memory = (ctypes.c_uint8 * max(size, 1)).from_address(pointer)
        return np.ctypeslib.as_array(memory)

    def free_pinned(self, array: NDArray[np.uint8]) -> None:
        """Through cudaFreeHost."""
        check(runtime.cudaFreeHost(array.ctypes.data), "freeing page-locked memory")

    def create_stream(self) -> int:
        """Non-blocking: independent of the legacy default stream."""
        flags = runtime.cudaStreamNonBlocking
        return int(check(runtime.cudaStreamCreateWithFlags(flags), "creating a stream"))

    def destroy_stream(self, stream: int) -> None:
        """Through cudaStreamDestroy."""
        check(runtime.cudaStreamDestroy(stream), "destroying a stream")

    def copy_to_device(self, pointer: int, array: NDArray[Any], stream: int) -> None:
        """Through cudaMemcpyAsync."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(runtime.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, stream), "copying to the GPU")

    def copy_to_host(self, array: NDArray[Any], pointer: int, stream: int) -> None:
        """Through cudaMemcpyAsync."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(runtime.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, stream), "copying from the GPU")

    def synchronize(self, stream: int) -> None:
        """Through cudaStreamSynchronize; a failure of an earlier launch shows here."""
        check(runtime.cudaStreamSynchronize(stream), "running the engine")

    def synchronize_device(self) -> None:
        """Through cudaDeviceSynchronize; a failure of an earlier launch shows here."""
        check(runtime.cudaDeviceSynchronize(), "waiting for the GPU")

    def create_event(self) -> Any:
        """Through cudaEventCreate: with timing."""
        return _Event()

    def record(self, event: Any, stream: int) -> None:
        """Through cudaEventRecord."""
        check(runtime.cudaEventRecord(event.handle, stream), "recording an event")

    def synchronize_event(self, event: Any) -> None:
        """Through cudaEventSynchronize; a failure of an earlier launch shows here."""
        check(runtime.cudaEventSynchronize(event.handle), "waiting for an event")

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Through cudaEventElapsedTime."""
        # Before that CUDA has no time for the pair, but the error cudaErrorNotReady.
        self.synchronize_event(end)
        return float(check(runtime.cudaEventElapsedTime(start.handle, end.handle), "timing"))

    def is_capturing(self, stream: int) -> bool:
        """Through cudaStreamIsCapturing."""
        status = check(runtime.cudaStreamIsCapturing(stream), "asking for a capture")
        return bool(status != runtime.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone)

    def begin_capture(self, stream: int) -> None:
        """Thread-local: other threads may continue with calls that a capture forbids."""
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(runtime.cudaStreamBeginCapture(stream, mode), "capturing a CUDA graph")

    def end_capture(self, stream: int) -> Any:
        """Captured and instantiated; the template is dropped."""
        graph = check(runtime.cudaStreamEndCapture(stream), "capturing a CUDA graph")
        try:
            return check(runtime.cudaGraphInstantiate(graph, 0), "instantiating a CUDA graph")
        finally:
            check(runtime.cudaGraphDestroy(graph), "dropping a CUDA graph")

    def abandon_capture(self, stream: int) -> None:
        """The status does not matter: a failed capture reports its failure here once more."""
        status, graph = runtime.cudaStreamEndCapture(stream)
        if status == runtime.cudaError_t.cudaSuccess:
            check(runtime.cudaGraphDestroy(graph), "dropping a CUDA graph")
        # The runtime keeps the last error until it is read; the next caller must not find this one.
        runtime.cudaGetLastError()

    def launch(self, graph: Any, stream: int) -> None:
        """Through cudaGraphLaunch."""
        check(runtime.cudaGraphLaunch(graph, stream), "launching a CUDA graph")

    def destroy_graph(self, graph: Any) -> None:
        """Through cudaGraphExecDestroy."""
        check(runtime.cudaGraphExecDestroy(graph), "destroying a CUDA graph")


class _Event:
    """An event that is destroyed with its last reference, as those of pycuda and torch are."""

    def __init__(self) -> None:
        self.handle = check(runtime.cudaEventCreate(), "creating an event")

    def __del__(self) -> None:
        # Without a handle it could not be created; the status does not matter: a GPU that has failed holds no events.
        # At interpreter exit the library may already be unloaded, and its events with it.
        if hasattr(self, "handle"):
            with suppress(Exception):
                runtime.cudaEventDestroy(self.handle)


def open_library() -> CudaBindings:
    """The CUDA runtime with its first GPU.

    Raises:
        DeployError: there is no GPU, or its driver is too old.
    """
    found = find_gpus()
    if not found.gpus:
        raise DeployError(f"engines cannot run here: {found.reason}", "run them on a machine with an NVIDIA GPU")
    check(runtime.cudaSetDevice(0), "choosing the GPU")
    return CudaBindings()
