"""Engines on a GPU: NumPy arrays in and out, or arrays that are on the GPU already, without a copy."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from repvgg_deploy.artifacts import Array, Provenance
from repvgg_deploy.engine.cleanup import release_at_close
from repvgg_deploy.engine.context import batch_shape, create_context, execute, require_batch, set_address, set_batch
from repvgg_deploy.engine.cuda.interface import DeviceArray, stream_handle
from repvgg_deploy.engine.loading import LoadedEngine, load_plan
from repvgg_deploy.engine.log import naming_gpu
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.engine.stream import BatchStream, EngineStream
from repvgg_deploy.errors import DeployError


class EngineRunner:
    """A deserialized engine with its buffers; not for several threads at once.

    Attributes:
        streams: one per stream; see `batch_streams` for a harness that enqueues by itself.
        cuda: the CUDA library that it runs through.
        input, outputs: the tensors; -1 for a dynamic batch.
        profile: smallest, best and largest batch.
        provenance: of the checkpoint; None if the sidecar does not say.
        options: of the build; None if there is no sidecar.
        warnings: of the library, when it loaded the plan.
    """

    def __init__(self, loaded: LoadedEngine, streams: int = 1, graphs: bool = True) -> None:
        """Take ownership of `loaded`: it is closed with the runner, and also if the runner cannot be made."""
        self._loaded = loaded
        self.backend: str = loaded.backend.name
        self.backend_version: str = loaded.backend.version
        self.precision: str = loaded.side.precision if loaded.side is not None else "unknown"
        self.provenance: Provenance | None = loaded.side.provenance if loaded.side is not None else None
        self.options = loaded.side.options if loaded.side is not None else None
        self.input: Tensor = loaded.inputs[0]
        self.outputs: tuple[Tensor, ...] = loaded.outputs
        self.profile = loaded.profile
        self.warnings = loaded.warnings
        self.cuda = loaded.cuda
        self.streams: list[EngineStream] = []
        self._borrowing: Any = None
        self._borrowed: int | None = None
        self._closed = False
        with ExitStack() as cleanup:
            release_at_close(cleanup, loaded.close)
            if streams < 1:
                raise DeployError(f"the number of streams cannot be {streams}", "at least 1")
            for _ in range(streams):
                self.streams.append(EngineStream(loaded, graphs))
                release_at_close(cleanup, self.streams[-1].close)
            release_at_close(cleanup, self._let_go)
            release_at_close(cleanup, self._finish_borrowed_runs)
            self._cleanup = cleanup.pop_all()

    @property
    def batch(self) -> int | None:
        """The one batch that the engine takes, or None for any: `run` splits what is larger than the profile."""
        return None if self.input.shape[0] < 0 else self.input.shape[0]

    def __call__(self, images: Any, stream: Any = None) -> Any:
        """The output (or, of several, all by name) for `images`: NumPy gives NumPy, a GPU array gives GPU arrays."""
        outputs = self.run(images) if isinstance(images, np.ndarray) else self.run_on_device(images, stream=stream)
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def run(self, images: Array) -> dict[str, Array]:
        """The outputs by name for any number of images as the engine declares its input.

        They are cut into batches of the profile, which the streams take turns with; a batch smaller than the
        profile's smallest is filled up, and the filling dropped.

        Raises:
            DeployError: the shape or the type is another, or the GPU fails.
        """
        self._require_input(images.shape, images.dtype)
        smallest, _, largest = self.profile
        parts: list[dict[str, Array]] = []
        running: deque[tuple[EngineStream, int]] = deque()
        for number, start in enumerate(range(0, len(images), largest)):
            stream = self.streams[number % len(self.streams)]
            # A stream's page-locked memory has room for one batch: its results are taken before it gets the next.
            if len(running) == len(self.streams):
                parts.append(self._collect(*running.popleft()))
            chunk = images[start : start + largest]
            batch = max(len(chunk), smallest)
            stream.images[: len(chunk)] = chunk
            stream.images[len(chunk) : batch] = 0
            stream.upload(batch)
            stream.enqueue(batch)
            stream.download(batch)
            running.append((stream, len(chunk)))
        while running:
            parts.append(self._collect(*running.popleft()))
        if not parts:
            return {t.name: np.empty(batch_shape(t, 0), t.dtype) for t in self.outputs}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _collect(self, stream: EngineStream, count: int) -> dict[str, Array]:
        stream.synchronize()
        # Copies: the stream's memory is written again by its next batch.
        return {name: values[:count].copy() for name, values in stream.results.items()}

    def batch_streams(self, images: Array) -> list[BatchStream]:
        """The streams, each prepared for runs of this one batch: for a benchmark, with the events of `cuda`.

        Raises:
            DeployError: the shape, the type or the batch does not fit.
        """
        self._require_input(images.shape, images.dtype)
        require_batch(self._loaded, len(images))
        return [BatchStream(stream, images) for stream in self.streams]

    def run_on_device(
        self, images: Any, outputs: dict[str, Any] | None = None, stream: Any = None
    ) -> dict[str, DeviceArray]:
        """The outputs by name, for a batch that is in GPU memory, without any copy.

        Args:
            images: whatever has `__cuda_array_interface__` (torch, cupy, pycuda, numba), or a DeviceArray made of a
                raw pointer; contiguous, in the engine's type, of a batch within the profile.
            outputs: arrays to write to, by name; those that are not given are allocated.
            stream: a stream of torch, cupy, pycuda, cuda.core or cuda.bindings, or its handle: the one that fills
                `images`, or one that waits for it. With one, the run is only enqueued, and all arrays must live
                until it is done; the next run in another stream first waits for it. Without one, this call first waits
                for everything on the GPU, so that `images` is complete whoever fills it, and then for the run.

        Raises:
            DeployError: an array does not fit, or the GPU fails.
        """
        borrowed = DeviceArray.borrow(images)
        self._require_input(borrowed.shape, borrowed.dtype)
        if self._borrowing is None:
            # Its own context: the addresses of the streams' contexts are part of their graphs.
            self._borrowing = create_context(self._loaded)
        context, batch = self._borrowing, borrowed.shape[0]
        set_batch(self._loaded, context, batch)
        results = {t.name: self._output_array(t, batch, (outputs or {}).get(t.name)) for t in self.outputs}
        set_address(self._loaded, context, self.input.name, borrowed.pointer)
        for name, array in results.items():
            set_address(self._loaded, context, name, array.pointer)
        if stream is not None:
            self._execute_after_the_last(context, stream_handle(stream))
            return results
        # The stream's stream waits for no other, not even for the default one, in which torch fills its tensors.
        with naming_gpu(self._loaded.backend):
            self.cuda.synchronize_device()
        execute(self._loaded, context, self.streams[0].handle)
        self.streams[0].synchronize()
        return results

    def _execute_after_the_last(self, context: Any, stream: int) -> None:
        """Enqueue a run; where the last one is in another stream, wait for it: a context runs once at a time."""
        with naming_gpu(self._loaded.backend):
            # What is captured does not run yet, and a capture forbids to wait.
            if self._borrowed not in (None, stream) and not self.cuda.is_capturing(stream):
                # Not with an event: pycuda records them in streams of its own only.
                self.cuda.synchronize_device()
        self._borrowed = stream
        execute(self._loaded, context, stream)

    def _output_array(self, tensor: Tensor, batch: int, given: Any) -> DeviceArray:
        shape, dtype = batch_shape(tensor, batch), np.dtype(tensor.dtype)
        if given is None:
            return _allocate(self.cuda, shape, dtype)
        array = DeviceArray.borrow(given)
        if array.shape != shape or array.dtype != dtype:
            raise DeployError(
                f"the output {tensor.name} is {shape} {dtype}, the array given is {array.shape} {array.dtype}",
                "give an array of that shape and type, or none",
            )
        return array

    def _require_input(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if self._closed:
            raise DeployError("the engine was closed", "run it inside its `with` block")
        wanted = tuple(self.input.shape[1:])
        if tuple(shape[1:]) != wanted or dtype != np.dtype(self.input.dtype):
            raise DeployError(
                f"the engine takes (N, {', '.join(map(str, wanted))}) {self.input.dtype}, not {tuple(shape)} {dtype}",
                "prepare the images as the model's preprocessing says",
            )

    def close(self) -> None:
        """Release the GPU's memory, even if a step fails; a second call is a no-op.

        Raises:
            DeployError: the first failure, where there was one.
        """
        self._cleanup.close()

    def _finish_borrowed_runs(self) -> None:
        """Wait for what was enqueued in the callers' streams: its context and its memory are released next."""
        self._closed = True
        if self._borrowed is not None:
            with naming_gpu(self._loaded.backend):
                self.cuda.synchronize_device()

    def _let_go(self) -> None:
        self._closed = True
        self._borrowing = None
        self._borrowed = None
        self.streams.clear()

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Told of the block's error, so that a failure to release something does not hide it.
        self._cleanup.__exit__(kind, error, trace)


class _OwnedMemory:
    """Device memory that is freed with its last reference."""

    def __init__(self, cuda: Any, size: int) -> None:
        self._cuda = cuda
        self.pointer: int = cuda.allocate(size)

    def __del__(self) -> None:
        pointer = getattr(self, "pointer", None)
        if pointer is not None:
            # At interpreter exit the CUDA library may already be unloaded, and its memory with it.
            with suppress(Exception):
                self._cuda.free(pointer)


def _allocate(cuda: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
    memory = _OwnedMemory(cuda, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    return DeviceArray(memory.pointer, shape, dtype, memory)


def open_engine(
    path: str | os.PathLike[str],
    trust: bool = False,
    backend: str | None = None,
    cuda: str | None = None,
    streams: int = 1,
    graphs: bool = True,
) -> EngineRunner:
    """The engine in a plan, ready to run on this machine's first GPU.

    Args:
        path: the `.plan`; its sidecar stands beside it.
        trust: run a plan without a sidecar, or with another hash: a plan can hold code.
        backend: the library of a trusted plan without a sidecar, `tensorrt` or `tensorrt-rtx`.
        cuda: `cuda.bindings` or `pycuda`; by default the first that is installed.
        streams: how many batches may be in flight.
        graphs: replay CUDA graphs, one per batch size, where the CUDA library has them.

    Raises:
        DeployError: the plan is not what was built, it is for another library, version or GPU, or none is here.
    """
    return EngineRunner(load_plan(Path(path), trust, backend, cuda), streams, graphs)


@contextmanager
def load_engine(path: str | os.PathLike[str], **options: Any) -> Iterator[EngineRunner]:
    """An engine for the length of a `with` block, with the options of `open_engine`.

    Raises:
        DeployError: as `open_engine` does.

    Example:
        >>> from repvgg_deploy import load_engine
        >>> with load_engine("net.fp16.plan") as engine:  # doctest: +SKIP
        ...     logits = engine(images)
    """
    with open_engine(path, **options) as runner:
        yield runner
