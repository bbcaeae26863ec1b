"""The part of CUDA that running an engine needs, as one interface over `cuda.bindings` and over `pycuda`.

Device pointers and streams are plain integers here, as TensorRT, torch and cupy give and take them.
"""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.gpus import find_gpus

LIBRARIES = ("cuda.bindings", "pycuda")


class Cuda(Protocol):
    """Memory, streams, events and graphs of the first GPU.

    Every method raises DeployError where CUDA reports a failure, with the memory that was wanted if it ran out.
    """

    @property
    def name(self) -> str:
        """`cuda.bindings` or `pycuda`."""

    @property
    def has_graphs(self) -> bool:
        """Whether a stream can be captured into a graph."""

    def close(self) -> None:
        """Declare that one engine no longer needs the GPU; the process stays in its context."""

    def allocate(self, size: int) -> int:
        """A device pointer to `size` bytes."""

    def free(self, pointer: int) -> None:
        """Release device memory."""

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """Page-locked host memory, from which copies run beside the host's work."""

    def free_pinned(self, array: NDArray[np.uint8]) -> None:
        """Release page-locked memory; nothing may refer to it any more."""

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""

    def destroy_stream(self, stream: int) -> None:
        """The inverse of `create_stream`."""

    def copy_to_device(self, pointer: int, array: NDArray[Any], stream: int) -> None:
        """Enqueue a copy of a contiguous host array."""

    def copy_to_host(self, array: NDArray[Any], pointer: int, stream: int) -> None:
        """Enqueue a copy into a contiguous host array."""

    def synchronize(self, stream: int) -> None:
        """Wait until all of a stream is done."""

    def synchronize_device(self) -> None:
        """Wait until all streams are done, those of other libraries too."""

    def create_event(self) -> Any:
        """An event that keeps the time; it goes with its last reference."""

    def record(self, event: Any, stream: int) -> None:
        """Enqueue the event."""

    def synchronize_event(self, event: Any) -> None:
        """Wait until what was enqueued before an event is done."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that are over."""

    def is_capturing(self, stream: int) -> bool:
        """Whether what is enqueued in a stream goes into a graph, as far as the library can tell."""

    def begin_capture(self, stream: int) -> None:
        """From now on, what is enqueued in `stream` by this thread goes into a graph."""

    def end_capture(self, stream: int) -> Any:
        """The graph, ready to be launched."""

    def abandon_capture(self, stream: int) -> None:
        """End a capture that failed; the graph is dropped."""

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a graph."""

    def destroy_graph(self, graph: Any) -> None:
        """The inverse of `end_capture`."""


def open_cuda(library: str | None = None) -> Cuda:
    """The CUDA library that was named (or the environment's REPVGG_DEPLOY_CUDA), else the first that works here.

    Raises:
        DeployError: the package is not installed or does not fit the driver, or there is no GPU.
    """
    name = library or os.environ.get("REPVGG_DEPLOY_CUDA") or None
    if name is not None and name not in LIBRARIES:
        raise DeployError(f"no CUDA library is called {name!r}", f"one of: {', '.join(LIBRARIES)}")
    reasons = []
    for candidate in (name,) if name is not None else LIBRARIES:
        module = "bindings" if candidate == "cuda.bindings" else "pycuda"
        try:
            opened: Cuda = _import_quietly(f"repvgg_deploy.engine.cuda.{module}").open_library()
            return opened
        except ImportError as error:
            reasons.append(f"{candidate}: {str(error).splitlines()[0]}")
        except DeployError as error:
            # A cuda.bindings that is too new for the driver does not rule out pycuda, which may fit it.
            reasons.append(f"{candidate}: {error.message}")
    found = find_gpus()
    if not found.gpus:
        others = "; ".join(reason for reason in reasons if found.reason not in reason)
        raise DeployError(
            f"engines cannot run here: {found.reason}" + (f" ({others})" if others else ""),
            "run them on a machine with an NVIDIA GPU",
        )
    raise DeployError(
        f"engines cannot run: no CUDA library for Python works here ({'; '.join(reasons)})",
        "pip install cuda-python, of the driver's CUDA version",
    )


def _import_quietly(module: str) -> Any:
    # What pycuda warns of when it is imported is not the user's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def out_of_memory(doing: str) -> DeployError:
    """The error of both libraries for memory that the GPU does not have."""
    return DeployError(
        f"{doing}: the GPU has too little free memory", "a smaller batch; `nvidia-smi` shows who holds the memory"
    )


@dataclass
class DeviceArray:
    """A C-contiguous array in device memory that this process owns or borrows.

    It has `__cuda_array_interface__` (version 3), so torch.as_tensor and cupy.asarray take it without a copy; and it
    is made from whatever has one: torch, cupy, pycuda, numba.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any = None

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # Without `stream`: whoever takes the array waits for nothing, as `run_on_device` says of its callers.
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.pointer, False), "version": 3}

    @classmethod
    def borrow(cls, array: Any) -> DeviceArray:
        """`array` without a copy; it is kept alive.

        Raises:
            DeployError: it is not in device memory, not contiguous, or its library does not let others read it.
        """
        if isinstance(array, DeviceArray):
            return array
        try:
            interface = array.__cuda_array_interface__
        except RuntimeError as error:
            # Torch's, for a tensor that requires gradients.
            raise DeployError(f"a {type(array).__name__} cannot be read: {error}", "torch's `.detach()`") from error
        except (AttributeError, TypeError) as error:
            raise DeployError(
                f"a {type(array).__name__} is not in GPU memory",
                "give an array of torch, cupy, pycuda or numba on the GPU, or a NumPy array to `run`",
            ) from error
        dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
        strides = interface.get("strides")
        if strides is not None and tuple(strides) != _contiguous_strides(shape, dtype.itemsize):
            raise DeployError(
                "the array is not contiguous in GPU memory", "make it contiguous: torch's `.contiguous()`"
            )
        return cls(int(interface["data"][0]), shape, dtype, array)


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides: list[int] = []
    for size in reversed(shape):
        strides.append(itemsize)
        itemsize *= size
    return tuple(reversed(strides))


def stream_handle(stream: Any) -> int:
    """The CUDA stream as an integer: an integer, or a stream of torch, cupy, pycuda, cuda.core or cuda.bindings.

    Raises:
        DeployError: it is none of these.
    """
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        # cuda.core's protocol: the version of the protocol, and the handle.
        return int(stream.__cuda_stream__()[1])
    # Of torch, cupy and pycuda.
    for attribute in ("cuda_stream", "ptr", "handle"):
        value = getattr(stream, attribute, None)
        if value is not None:
            return int(value)
    if hasattr(stream, "__int__") and not isinstance(stream, float):
        # cudaStream_t and CUstream of cuda.bindings.
        return int(stream)
    raise DeployError(f"a {type(stream).__name__} is not a CUDA stream", "give its handle as an integer")
