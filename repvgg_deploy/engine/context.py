"""Execution contexts: made, told their batch, run, waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repvgg_deploy.engine.backends import has
from repvgg_deploy.engine.loading import LoadedEngine
from repvgg_deploy.engine.log import collect_messages, explain_failure, naming_gpu
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.errors import DeployError


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

    Raises:
        DeployError: the GPU has too little memory.
    """
    strategies = loaded.backend.module.ExecutionContextAllocationStrategy
    strategy = strategies.STATIC if scratch is None else strategies.USER_MANAGED
    with collect_messages(loaded.backend) as messages:
        context = loaded.engine.create_execution_context(_configure_context(loaded, strategy))
        if context is None:
            raise explain_failure(loaded.backend, f"preparing {loaded.plan}", messages)
    if scratch is not None:
        context.set_device_memory(scratch.pointer, scratch.size)
    return context


def _configure_context(loaded: LoadedEngine, strategy: Any) -> Any:
    """What a context is created from: the strategy for its memory, or TensorRT-RTX's configuration with it.

    TensorRT-RTX would compile the kernels of a shape in the background and run a slow substitute meanwhile, which a
    graph would hold for good. EAGER compiles them in the first run.
    """
    trt = loaded.backend.module
    if not (
        has(trt, "DynamicShapesKernelSpecializationStrategy")
        and has(trt, "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy")
    ):
        return strategy
    config = loaded.engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return config


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
    """Nothing, where the engine's profile has a batch.

    Raises:
        DeployError: it does not.
    """
    smallest, _, largest = loaded.profile
    if not smallest <= batch <= largest:
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


def wait_for(loaded: LoadedEngine, stream: int) -> None:
    """Wait until a stream is done.

    Raises:
        DeployError: something in it failed.
    """
    with naming_gpu(loaded.backend):
        loaded.cuda.synchronize(stream)
