"""One stream of work on an engine: an execution context, its buffers on both sides, and its CUDA graphs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.engine.backends import has
from repvgg_deploy.engine.loading import LoadedEngine
from repvgg_deploy.engine.messages import collect_messages, explain_failure
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.errors import DeployError

Array = NDArray[Any]


class Lane:
    """A stream with an execution context and buffers for the largest batch, all of them made once.

    `upload`, `enqueue` and `download` only enqueue; `synchronize` waits. Lanes of one engine run side by side.

    Attributes:
        stream: its handle.
        images: page-locked memory for the input, (largest batch, …).
        results: page-locked memory for the outputs, by name.
    """

    def __init__(self, loaded: LoadedEngine, graphs: bool) -> None:
        self._loaded, self._cuda = loaded, loaded.cuda
        self._graphs = graphs and loaded.cuda.has_graphs
        self._captured: dict[int, Any] = {}
        self._pointers: dict[str, int] = {}
        self._batch = 0
        with ExitStack() as cleanup:
            self.stream = self._cuda.create_stream()
            cleanup.callback(self._cuda.destroy_stream, self.stream)
            self.context: Any = create_context(loaded)
            hosts = {t.name: self._allocate(t, cleanup) for t in (*loaded.inputs, *loaded.outputs)}
            for name, pointer in self._pointers.items():
                self.context.set_tensor_address(name, pointer)
            # Only what was made to its end is kept; after a failure all of it goes back at once.
            self._cleanup = cleanup.pop_all()
        self.images: Array = hosts.pop(loaded.inputs[0].name)
        self.results: dict[str, Array] = hosts

    def _allocate(self, tensor: Tensor, cleanup: ExitStack) -> Array:
        """The host side of a tensor; the device side goes into the table of pointers."""
        shape = batch_shape(tensor, self._loaded.profile[2])
        dtype = np.dtype(tensor.dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        pointer = self._cuda.allocate(size)
        cleanup.callback(self._cuda.free, pointer)
        raw = self._cuda.allocate_pinned(size)
        cleanup.callback(self._cuda.free_pinned, raw)
        self._pointers[tensor.name] = pointer
        return raw[:size].view(dtype).reshape(shape)

    def upload(self, batch: int) -> None:
        """Enqueue the copy of the first `batch` of `images` to the GPU."""
        name = self._loaded.inputs[0].name
        self._cuda.copy_to_device(self._pointers[name], self.images[:batch], self.stream)

    def download(self, batch: int) -> None:
        """Enqueue the copy of the outputs of `batch` images into `results`."""
        for name, host in self.results.items():
            self._cuda.copy_to_host(host[:batch], self._pointers[name], self.stream)

    def enqueue(self, batch: int) -> None:
        """Enqueue one run on what is in the GPU's buffers: from the second time on as a CUDA graph."""
        if batch in self._captured:
            self._cuda.launch(self._captured[batch], self.stream)
            return
        self._set_batch(batch)
        if self._graphs and self._can_capture():
            # The library prepares itself in the first run after a change of shape, which no graph may hold.
            execute(self._loaded, self.context, self.stream)
            self._cuda.synchronize(self.stream)
            self._captured[batch] = self._capture()
            self._cuda.launch(self._captured[batch], self.stream)
        else:
            execute(self._loaded, self.context, self.stream)

    def _set_batch(self, batch: int) -> None:
        if batch != self._batch:
            set_batch(self._loaded, self.context, batch)
            self._batch = batch

    def _can_capture(self) -> bool:
        if has(self._loaded.backend.module, "IExecutionContext.is_stream_capturable"):
            return bool(self.context.is_stream_capturable(self.stream))
        return True

    def _capture(self) -> Any:
        self._cuda.begin_capture(self.stream)
        try:
            execute(self._loaded, self.context, self.stream)
        except DeployError:
            self._cuda.abandon_capture(self.stream)
            raise
        return self._cuda.end_capture(self.stream)

    def record(self, event: Any) -> None:
        """Enqueue an event of `Cuda.create_event`."""
        self._cuda.record(event, self.stream)

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        self._cuda.synchronize(self.stream)

    def close(self) -> None:
        """Give everything back; the lane cannot be used any more."""
        self._cuda.synchronize(self.stream)
        for graph in self._captured.values():
            self._cuda.destroy_graph(graph)
        self._captured.clear()
        # The context and the views go before the memory that they use.
        self.context = None
        del self.images, self.results
        self._cleanup.close()


class BatchLane:
    """A lane with the batch size fixed: what a benchmark enqueues over and over.

    After the constructor the images are on the GPU and, where there are graphs, the run is captured.
    """

    def __init__(self, lane: Lane, images: Array) -> None:
        self._lane, self._batch = lane, len(images)
        lane.images[: len(images)] = images
        for step in (self.upload, self.enqueue, self.download):
            step()
        lane.synchronize()

    def upload(self) -> None:
        """Enqueue the copy of the images to the GPU."""
        self._lane.upload(self._batch)

    def enqueue(self) -> None:
        """Enqueue one run."""
        self._lane.enqueue(self._batch)

    def download(self) -> None:
        """Enqueue the copy of the outputs to the host."""
        self._lane.download(self._batch)

    def record(self, event: Any) -> None:
        """Enqueue an event of `Cuda.create_event`."""
        self._lane.record(event)

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        self._lane.synchronize()


def batch_shape(tensor: Tensor, batch: int) -> tuple[int, ...]:
    """The shape of a tensor for one batch size."""
    return (batch if tensor.shape[0] < 0 else tensor.shape[0], *tensor.shape[1:])


def create_context(loaded: LoadedEngine) -> Any:
    """An execution context, with its own scratch memory.

    Raises:
        DeployError: the GPU has too little memory.
    """
    with collect_messages(loaded.backend) as messages:
        context = loaded.engine.create_execution_context()
        if context is None:
            raise explain_failure(loaded.backend, f"preparing {loaded.plan}", messages)
    return context


def set_batch(loaded: LoadedEngine, context: Any, batch: int) -> None:
    """Tell a context the batch of its next run.

    Raises:
        DeployError: the profile does not have it.
    """
    images = loaded.inputs[0]
    smallest, _, largest = loaded.profile
    if not smallest <= batch <= largest or not context.set_input_shape(images.name, batch_shape(images, batch)):
        raise DeployError(
            f"{loaded.plan} takes batches from {smallest} to {largest}, not {batch}",
            "export with another --batch-range, or give another batch",
        )


def execute(loaded: LoadedEngine, context: Any, stream: int) -> None:
    """Enqueue one run of a context on whatever its tensors' addresses are.

    Raises:
        DeployError: the library refuses.
    """
    with collect_messages(loaded.backend) as messages:
        if not context.execute_async_v3(stream):
            raise explain_failure(loaded.backend, f"running {loaded.plan}", messages)
