"""Execution contexts: made, told their batch, run, waited for."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from repvgg_deploy.engine.context_settings import ContextSettings
from repvgg_deploy.engine.loading import LoadedEngine
from repvgg_deploy.engine.log import collect_messages, explain_failure, naming_gpu
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.engine.timing_cache import runtime_cache_path
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.gpus import find_gpus

ALIGNMENT = 256
"""The alignment in bytes of the addresses of inputs and outputs (NVIDIA's guide, "setTensorAddress")."""


def batch_shape(tensor: Tensor, batch: int) -> tuple[int, ...]:
    """The shape of a tensor for one batch size."""
    return (batch if tensor.shape[0] < 0 else tensor.shape[0], *tensor.shape[1:])


@dataclass(frozen=True)
class Scratch:
    """GPU memory in which contexts that never run side by side keep their activations."""

    pointer: int
    size: int


def create_context(loaded: LoadedEngine, scratch: Scratch | None = None) -> Any:
    """An execution context on `scratch`, of the engine's `device_memory_size_v2` bytes, or with memory of its own.

    It names no layers to profilers by itself: with the detailed names that the plan holds, that slows every run down.

    Raises:
        DeployError: the GPU has too little memory.
    """
    strategies = loaded.backend.module.ExecutionContextAllocationStrategy
    # STATIC allocates for the largest batch, and would do so for each captured size, all of which have contexts.
    strategy = strategies.STATIC if scratch is None else strategies.USER_MANAGED
    with collect_messages(loaded.backend) as messages:
        context = loaded.engine.create_execution_context(_create_from(loaded, strategy))
        if context is None:
            raise explain_failure(loaded.backend, f"preparing {loaded.plan}", messages)
    context.nvtx_verbosity = loaded.backend.module.ProfilingVerbosity.NONE
    if scratch is not None:
        context.set_device_memory(scratch.pointer, scratch.size)
    return context


def _create_from(loaded: LoadedEngine, strategy: Any) -> Any:
    """What a context is created from: the strategy for its memory, or TensorRT-RTX's configuration with it."""
    if not ContextSettings.has_any(loaded.backend):
        return strategy
    if loaded.settings is None:
        found = find_gpus()
        gpu = found.gpus[0] if found.gpus else None
        path = None
        # Without a home folder kernels are compiled in each process.
        with suppress(DeployError):
            path = runtime_cache_path(loaded.backend, gpu, loaded.sha256)
        loaded.settings = ContextSettings(loaded.backend, loaded.engine, path)
    return loaded.settings.config(strategy)


def set_address(loaded: LoadedEngine, context: Any, name: str, pointer: int) -> None:
    """Tell a context where one of its tensors is in GPU memory.

    Raises:
        DeployError: the address is not a multiple of 256, which the library's kernels rely on, or it is refused.
    """
    if pointer % ALIGNMENT:
        raise DeployError(
            f"the memory of {name} starts {pointer % ALIGNMENT} bytes after a multiple of {ALIGNMENT}; "
            f"{loaded.backend.label} needs it to start at one",
            "give a whole array, not a part of one: torch's `.clone()`",
        )
    with collect_messages(loaded.backend) as messages:
        if not context.set_tensor_address(name, pointer):
            raise explain_failure(loaded.backend, f"giving {loaded.plan} the memory of {name}", messages)


def set_batch(loaded: LoadedEngine, context: Any, batch: int) -> None:
    """Tell a context the batch of its next run.

    Raises:
        DeployError: the profile does not have it, or the library refuses.
    """
    require_batch(loaded, batch)
    images = loaded.inputs[0]
    with collect_messages(loaded.backend) as messages:
        if not context.set_input_shape(images.name, batch_shape(images, batch)):
            raise explain_failure(loaded.backend, f"preparing {loaded.plan} for a batch of {batch}", messages)


def require_batch(loaded: LoadedEngine, batch: int) -> None:
    """Raise DeployError unless the engine's profile includes this batch size.

    Raises:
        DeployError: the batch is outside the profile's range.
    """
    smallest, _, largest = loaded.profile
    if not smallest <= batch <= largest:
        raise DeployError(
            f"{loaded.plan} takes batches from {smallest} to {largest}, not {batch}",
            "export with another --batch-range, or use another batch size",
        )


def execute(loaded: LoadedEngine, context: Any, stream: int) -> None:
    """Enqueue one run of a context on whatever its tensors' addresses are.

    Raises:
        DeployError: the library refuses.
    """
    with collect_messages(loaded.backend) as messages:
        if not context.execute_async_v3(stream):
            raise explain_failure(loaded.backend, f"running {loaded.plan}", messages)


def wait_for(loaded: LoadedEngine, stream: int) -> None:
    """Wait until a stream is done.

    Raises:
        DeployError: something in it failed.
    """
    with naming_gpu(loaded.backend):
        loaded.cuda.synchronize(stream)
