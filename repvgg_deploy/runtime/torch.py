"""Nets in torch: eager, compiled, or as a CUDA graph; on the CPU or a GPU; in any of torch's precisions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from repvgg_deploy.artifacts import Array
from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.torch_precision import float32

TorchPrecision = Literal["fp32", "tf32", "bf16", "fp16"]
TorchMode = Literal["eager", "compiled", "cuda-graph"]

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class TorchOptions:
    """How a net is run.

    Attributes:
        device: `cpu` or `cuda`.
        precision: tf32 is float32 with tensor cores that round the factors to 10 bits, on a GPU only; in fp32 they are
            off, for convolutions as well.
        mode: `compiled` is torch.compile, `cuda-graph` replays the eager net's kernels without the host.
        channels_last: NHWC in memory.
    """

    device: str = "cpu"
    precision: TorchPrecision = "fp32"
    mode: TorchMode = "eager"
    channels_last: bool = False

    def check(self) -> None:
        """Raise DeployError unless torch can run with these options on this machine.

        Raises:
            DeployError: a name is unknown, or the options need a GPU that is not there.
        """
        if self.precision not in get_args(TorchPrecision):
            raise DeployError(f"torch has no precision {self.precision!r}", "fp32, tf32, bf16 or fp16")
        if self.mode not in get_args(TorchMode):
            raise DeployError(f"torch has no mode {self.mode!r}", "eager, compiled or cuda-graph")
        if self.device not in ("cpu", "cuda"):
            raise DeployError(f"torch runs on cpu or cuda here, not on {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise DeployError("torch sees no CUDA GPU here", "run it on the CPU, or install torch for CUDA")
        if self.device == "cpu" and (self.precision == "tf32" or self.mode == "cuda-graph"):
            raise DeployError(f"{self.precision} {self.mode} needs a GPU", "use fp32 and eager on the CPU")

    @property
    def label(self) -> str:
        """The mode and the memory format, for tables."""
        return self.mode + (", channels-last" if self.channels_last else "")


class TorchRunner:
    """A net in torch: without options in eager mode, on the CPU, in the type of its weights.

    `net` gives logits (N, classes) for normalized images (N, C, H, W), or a backbone its features. With options it is
    copied first.
    """

    backend_version: str = torch.__version__
    batch = None

    def __init__(self, net: nn.Module, options: TorchOptions | None = None) -> None:
        self.options = options or TorchOptions()
        self.options.check()
        self.backend = f"torch-{self.options.device}"
        if options is None:
            self._net = net.eval()
            self.dtype = next(net.parameters()).dtype
            self.precision: str = _NAMES[self.dtype]
        else:
            self.dtype = _DTYPES[options.precision]
            self.precision = options.precision
            self._net = copy.deepcopy(net).eval().requires_grad_(False).to(options.device, self.dtype)
            if options.channels_last:
                self._net = self._net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._output = net.spec.output_names[0] if isinstance(net, RepVGG) and not net.spec.classes else "logits"
        self._forward: Callable[[Tensor], Tensor] = self._net
        self._compiled_shapes: set[torch.Size] = set()
        if self.options.mode == "compiled":
            # Without `fullgraph` what cannot be compiled would run eagerly, and nobody would know.
            self._forward = torch.compile(self._net, dynamic=False, fullgraph=True)

    def run(self, images: Array) -> dict[str, Array]:
        """`logits` (N, classes) or `features` (N, C) of normalized images (N, C, H, W), on the host."""
        logits = self.forward(self.place(images))
        # NumPy has no bfloat16.
        return {self._output: (logits.float() if logits.dtype == torch.bfloat16 else logits).cpu().numpy()}

    def place(self, images: Array) -> Tensor:
        """`images` on the device, in the net's type and memory format."""
        placed = torch.from_numpy(images).to(self.options.device, self.dtype)
        return placed.contiguous(memory_format=self.memory_format)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of images that `place` gave, on the device; on a GPU this only enqueues."""
        with self.settings(), self._compiling(images.shape):
            return self._forward(images)

    def _compiling(self, shape: torch.Size) -> AbstractContextManager[Any]:
        """Where this call compiles: without torch's limit on compilations, beyond which it silently runs eagerly.

        The limit counts all nets of one class and all their batches together.
        """
        if self.options.mode != "compiled" or shape in self._compiled_shapes:
            return nullcontext()
        self._compiled_shapes.add(shape)
        from torch._dynamo import config

        limits = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")
        return cast(
            AbstractContextManager[Any], config.patch({name: 1 << 20 for name in limits if hasattr(config, name)})
        )

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the activations."""
        return torch.channels_last if self.options.channels_last else torch.contiguous_format

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Torch's global switches as this net wants them; several nets in one process may want other ones."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self.options.device == "cuda":
                stack.enter_context(float32(tf32=self.options.precision == "tf32", benchmark=True))
            yield


class TorchStream:
    """A net on a CUDA stream of its own with fixed buffers; see `repvgg_deploy.benchmark.workloads.Stream`.

    `images` are the batch as the net takes it, on the host. In the mode `cuda-graph` the kernels are captured here,
    after three runs in which cuDNN chooses its algorithms.
    """

    def __init__(self, runner: TorchRunner, images: Array) -> None:
        self._runner = runner
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        host = torch.from_numpy(images).to(runner.dtype).contiguous(memory_format=runner.memory_format)
        self._host = host.pin_memory()
        self._images = self._host.to("cuda", memory_format=runner.memory_format)
        self._graph: Any = None
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                self._logits = runner.forward(self._images)
        self._stream.synchronize()
        if runner.options.mode == "cuda-graph":
            self._graph = torch.cuda.CUDAGraph()
            with runner.settings(), torch.cuda.graph(self._graph, stream=self._stream):
                self._logits = runner.forward(self._images)
        self._results = torch.empty(self._logits.shape, dtype=self._logits.dtype, pin_memory=True)
        # The memory of cuDNN's search would stay reserved for this stream, out of the other streams' reach.
        torch.cuda.empty_cache()

    def upload(self) -> None:
        """Enqueue the copy of the batch to the GPU."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._images.copy_(self._host, non_blocking=True)

    def enqueue(self) -> None:
        """Enqueue one run."""
        if self._graph is None:
            with torch.cuda.stream(self._stream):
                self._logits = self._runner.forward(self._images)
            return
        # Some versions of torch write to tensors that were made during the capture.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._graph.replay()

    def download(self) -> None:
        """Enqueue the copy of the logits to the host."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._results.copy_(self._logits, non_blocking=True)

    def record(self, event: Any) -> None:
        """Enqueue an event."""
        event.record(self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def outputs(self) -> list[Array]:
        """The logits that the last download has copied to the host."""
        return [self._results.float().numpy()]


class TorchEvents:
    """Torch's CUDA events."""

    def create_event(self) -> Any:
        """An event that keeps the time."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that are over."""
        return cast(float, start.elapsed_time(end))

    def synchronize_event(self, event: Any) -> None:
        """Wait for an event."""
        event.synchronize()
