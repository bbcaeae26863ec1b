"""One stream of work on an engine: execution contexts, their buffers on both sides, and CUDA graphs."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.engine.backends import has
from repvgg_deploy.engine.cleanup import release_at_close
from repvgg_deploy.engine.context import Scratch, batch_shape, create_context, execute, set_address, set_batch, wait_for
from repvgg_deploy.engine.loading import LoadedEngine
from repvgg_deploy.engine.log import naming_gpu
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.errors import DeployError

Array = NDArray[Any]

# Batch sizes of one stream that get a graph; those beyond run without. Each costs a context, small without its scratch
# memory, and a graph.
MAX_GRAPHS = 16


@dataclass(frozen=True)
class _Prepared:
    """A batch size with a context of its own; `graph` is None if the run could not be captured."""

    context: Any
    graph: Any


class EngineStream:
    """A stream with execution contexts and buffers for the largest batch.

    `upload`, `enqueue` and `download` only enqueue; `synchronize` waits. Streams of one engine run side by side.

    A graph holds for the shapes that its context had at the capture, and for as long as it keeps them. So every batch
    size that is captured has a context of its own, whose shape is set once: a short last batch between two full ones
    costs no second capture. The contexts share one scratch memory, as only one of them runs at a time.

    Attributes:
        handle: of the stream, as CUDA has it.
        context: for the runs without a graph, of any batch.
        images: page-locked memory for the input, (largest batch, …).
        results: page-locked memory for the outputs, by name.
        without_graph: why a batch size runs without the graph that was requested.
    """

    def __init__(self, loaded: LoadedEngine, graphs: bool) -> None:
        self._loaded, self._cuda = loaded, loaded.cuda
        self._graphs = graphs and loaded.cuda.has_graphs
        self._prepared: dict[int, _Prepared] = {}
        self._captured = ExitStack()
        self._pointers: dict[str, int] = {}
        self._batch = 0
        self.without_graph: dict[int, str] = {}
        with ExitStack() as cleanup:
            self.handle = self._cuda.create_stream()
            release_at_close(cleanup, self._cuda.destroy_stream, self.handle)
            size = int(loaded.engine.device_memory_size_v2)
            self._scratch = Scratch(self._cuda.allocate(size), size)
            release_at_close(cleanup, self._cuda.free, self._scratch.pointer)
            hosts = {t.name: self._allocate(t, cleanup) for t in (*loaded.inputs, *loaded.outputs)}
            self.context: Any = self._create_context()
            # In reverse order: wait for the stream, then drop the graphs, the contexts, the arrays and what they use.
            release_at_close(cleanup, self._let_go)
            release_at_close(cleanup, self._captured.close)
            release_at_close(cleanup, self.synchronize)
            # Only what was made completely is kept; after a failure all of it is released at once.
            self._cleanup = cleanup.pop_all()
        self.images: Array = hosts.pop(loaded.inputs[0].name)
        self.results: dict[str, Array] = hosts

    def _allocate(self, tensor: Tensor, cleanup: ExitStack) -> Array:
        """The host side of a tensor; the device side goes into the table of pointers."""
        shape = batch_shape(tensor, self._loaded.profile[2])
        dtype = np.dtype(tensor.dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        pointer = self._cuda.allocate(size)
        release_at_close(cleanup, self._cuda.free, pointer)
        raw = self._cuda.allocate_pinned(size)
        release_at_close(cleanup, self._cuda.free_pinned, raw)
        self._pointers[tensor.name] = pointer
        return raw[:size].view(dtype).reshape(shape)

    def _create_context(self) -> Any:
        """A context on this stream's buffers."""
        context = create_context(self._loaded, self._scratch)
        for name, pointer in self._pointers.items():
            set_address(self._loaded, context, name, pointer)
        return context

    def upload(self, batch: int) -> None:
        """Enqueue the copy of the first `batch` of `images` to the GPU."""
        name = self._loaded.inputs[0].name
        self._cuda.copy_to_device(self._pointers[name], self.images[:batch], self.handle)

    def download(self, batch: int) -> None:
        """Enqueue the copy of the outputs of `batch` images into `results`."""
        # The first call after a run that can report its failure.
        with naming_gpu(self._loaded.backend):
            for name, host in self.results.items():
                self._cuda.copy_to_host(host[:batch], self._pointers[name], self.handle)

    def enqueue(self, batch: int) -> None:
        """Enqueue one run on what is in the GPU's buffers: as a CUDA graph, which the first run of a batch captures."""
        prepared = self._prepared.get(batch)
        if prepared is None and self._graphs:
            prepared = self._prepare(batch)
        if prepared is None:
            self._set_batch(batch)
            execute(self._loaded, self.context, self.handle)
        elif prepared.graph is None:
            execute(self._loaded, prepared.context, self.handle)
        else:
            self._cuda.launch(prepared.graph, self.handle)

    def _set_batch(self, batch: int) -> None:
        if batch != self._batch:
            set_batch(self._loaded, self.context, batch)
            self._batch = batch

    def _prepare(self, batch: int) -> _Prepared | None:
        """A context and a graph for a batch size that comes for the first time; None if there are enough."""
        if len(self._prepared) == MAX_GRAPHS:
            self.without_graph[batch] = f"{MAX_GRAPHS} other batch sizes have graphs"
            return None
        context = self._create_context()
        set_batch(self._loaded, context, batch)
        # The library prepares itself in the first run of a shape, which no graph may hold.
        execute(self._loaded, context, self.handle)
        self.synchronize()
        self._prepared[batch] = prepared = _Prepared(context, self._capture(batch, context))
        return prepared

    def _capture(self, batch: int, context: Any) -> Any:
        """The graph of a run; None if there can be none, and `without_graph` says why."""
        if not self._can_capture(context):
            self.without_graph[batch] = f"{self._loaded.backend.label} cannot capture this engine"
            return None
        try:
            graph = self._record_graph(context)
        except DeployError as error:
            # A context keeps working after a failed capture (NVIDIA's guide, "CUDA Graphs").
            self.without_graph[batch] = error.message
            return None
        release_at_close(self._captured, self._cuda.destroy_graph, graph)
        return graph

    def _can_capture(self, context: Any) -> bool:
        if has(self._loaded.backend.module, "IExecutionContext.is_stream_capturable"):
            return bool(context.is_stream_capturable(self.handle))
        return True

    def _record_graph(self, context: Any) -> Any:
        self._cuda.begin_capture(self.handle)
        try:
            execute(self._loaded, context, self.handle)
            return self._cuda.end_capture(self.handle)
        except BaseException:
            # Also after Ctrl-C: a stream that is left in capture can do nothing else, not even be waited for.
            with suppress(DeployError):
                self._cuda.abandon_capture(self.handle)
            raise

    def record(self, event: Any) -> None:
        """Enqueue an event of `Cuda.create_event`."""
        self._cuda.record(event, self.handle)

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        wait_for(self._loaded, self.handle)

    def close(self) -> None:
        """Release everything, even if a step fails; the stream cannot be used afterwards.

        Raises:
            DeployError: the first failure, where there was one.
        """
        self._cleanup.close()

    def _let_go(self) -> None:
        """Drop the contexts and the array views of the memory that is freed next."""
        self.context = None
        self._prepared.clear()
        del self.images, self.results


class BatchStream:
    """A stream with the batch size fixed: what a benchmark enqueues over and over.

    After the constructor the images are on the GPU and, where it can be, the run is captured.
    """

    def __init__(self, stream: EngineStream, images: Array) -> None:
        self._stream, self._batch = stream, len(images)
        stream.images[: len(images)] = images
        for step in (self.upload, self.enqueue, self.download):
            step()
        stream.synchronize()

    @property
    def without_graph(self) -> str:
        """Why the run is enqueued without the graph that was requested; empty if it is not."""
        return self._stream.without_graph.get(self._batch, "")

    def upload(self) -> None:
        """Enqueue the copy of the images to the GPU."""
        self._stream.upload(self._batch)

    def enqueue(self) -> None:
        """Enqueue one run."""
        self._stream.enqueue(self._batch)

    def download(self) -> None:
        """Enqueue the copy of the outputs to the host."""
        self._stream.download(self._batch)

    def record(self, event: Any) -> None:
        """Enqueue an event of `Cuda.create_event`."""
        self._stream.record(event)

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        self._stream.synchronize()

    def outputs(self) -> list[Array]:
        """The outputs that the last download has copied to the host; they are written again by the next one."""
        return [values[: self._batch] for values in self._stream.results.values()]
