"""What a benchmark runs: a file or an architecture, on one backend in one precision; closed, and opened."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from repvgg_deploy.benchmark.measure import Label, Workload
from repvgg_deploy.graphs.cost import Cost

if TYPE_CHECKING:
    from repvgg_deploy.engine.options import BuildOptions


@dataclass(frozen=True)
class Case:
    """What is to be opened.

    Attributes:
        model: a checkpoint, an ONNX graph, an engine, or the name of an architecture, which gets random weights.
        backend: one of `BACKENDS`; None for the natural one of the file, on a GPU where the library finds one.
        precision: fp32, fp16, int8; on torch also bf16, on torch and engines tf32. None for the file's own, else fp32.
        form: `deploy`, or `training` for a RepVGG with all its branches.
        mode: see `TorchOptions`.
        channels_last: NHWC in memory, in torch; None for what is best: NHWC in fp16 and bf16 on a GPU, whose tensor
            cores take nothing else without a copy.
        threads: of the CPU; 0 for the backend's choice.
        transfers: whether the copies to and from a GPU are part of a query.
        streams: of an engine, or of torch on a GPU.
        size: of the input in pixels, for an architecture.
        input_type: of what is exported from an architecture: float32, float16, or uint8 (NHWC).
        build: the options of the plan that an engine's baseline is built like; see `comparable_options`.
    """

    model: str
    backend: str | None = None
    precision: str | None = None
    form: str = "deploy"
    mode: str = "eager"
    channels_last: bool | None = None
    threads: int = 0
    transfers: bool = False
    streams: int = 1
    size: int | None = None
    input_type: str = "float32"
    build: BuildOptions | None = None

    @property
    def is_file(self) -> bool:
        """Whether `model` is a file that is there."""
        return Path(self.model).is_file()


@dataclass
class OpenedCase:
    """An opened model.

    Attributes:
        label: with batch 0.
        at_batch: the workload for one batch size.
        build: of an engine from a file, and of what is built to be compared with it.
        cost: of one batch; None if nothing tells what the model computes.
        parameters, top1: of the architecture, the accuracy as published; None if it has no card.
    """

    label: Label
    at_batch: Callable[[int], Workload]
    build: BuildOptions | None = None
    cost: Callable[[int], Cost] | None = None
    parameters: int | None = None
    top1: float | None = None
    cleanup: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Release what it holds."""
        self.cleanup.close()
