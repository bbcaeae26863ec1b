"""The roofline: what a model has to compute and move, against what this machine can, measured here.

Source: Williams, Waterman, Patterson, "Roofline" (https://doi.org/10.1145/1498765.1498785).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from repvgg_deploy.errors import DeployError
from repvgg_deploy.graphs.cost import ELEMENT_BYTES, Cost
from repvgg_deploy.runtime.onnxruntime import import_onnxruntime
from repvgg_deploy.torch_precision import float32


@dataclass(frozen=True)
class Ceiling:
    """The most that this machine was seen to do in one precision, and with what it was seen."""

    flops_per_sec: float
    bytes_per_sec: float
    source: str

    def best_of(self, other: Ceiling) -> Ceiling:
        """The higher of two ceilings that were measured in the same way."""
        return replace(
            self,
            flops_per_sec=max(self.flops_per_sec, other.flops_per_sec),
            bytes_per_sec=max(self.bytes_per_sec, other.bytes_per_sec),
        )

    def attainable(self, cost: Cost) -> float:
        """Operations per second that the slower of computing and moving allows."""
        return min(self.flops_per_sec, self.bytes_per_sec * cost.flops / cost.bytes)


@dataclass(frozen=True)
class RooflinePoint:
    """A measured model under its ceiling.

    `share` is of the attainable rate; above 1 where the implementation computes fewer products than the convolution's
    definition has (Winograd), or keeps activations in a cache.
    """

    tflops: float
    flops_per_byte: float
    attainable_tflops: float
    share: float
    bound: str

    @classmethod
    def of(cls, cost: Cost, seconds: float, ceiling: Ceiling) -> RooflinePoint:
        """The point of a batch that took `seconds`."""
        rate, attainable = cost.flops / seconds, ceiling.attainable(cost)
        bound = "compute" if attainable == ceiling.flops_per_sec else "memory"
        return cls(rate / 1e12, cost.flops / cost.bytes, attainable / 1e12, rate / attainable, bound)

    def to_dict(self) -> dict[str, float | str]:
        """The fields by name."""
        return asdict(self)


def measure_ceiling(precision: str, device: str = "cpu", seconds: float = 1.0) -> Ceiling:
    """The best rate of a large matrix product in `precision`, and of a copy (bytes read and written), on this machine.

    Raises:
        DeployError: nothing here multiplies matrices in that precision.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeployError("torch, which measures the ceilings, sees no CUDA GPU here", "leave --roofline out")
    if precision not in ELEMENT_BYTES:
        raise DeployError(f"no ceiling is known for {precision!r}", f"one of: {', '.join(ELEMENT_BYTES)}")
    product, side, source = _product(precision, device)
    rate = 2 * side**3 / _best_seconds(product, device, seconds)
    # 256 MiB, on a GPU 1 GiB: far more than the caches hold.
    count = (1 << 28) if device == "cuda" else (1 << 26)
    origin = torch.zeros(count, device=device)
    target = torch.ones_like(origin)
    moved = 2 * 4 * count / _best_seconds(lambda: target.copy_(origin), device, seconds)
    return Ceiling(rate, moved, f"{source} of {side} x {side}; copy of {4 * count >> 20} MiB")


def _product(precision: str, device: str) -> tuple[Callable[[], object], int, str]:
    """A call that multiplies two square matrices, their side, and what does it."""
    side = 8192 if device == "cuda" else 2048
    if precision == "int8" and device == "cpu":
        return _integer_product(side), side, f"ONNX Runtime {import_onnxruntime().__version__}, MatMulInteger"
    library = f"torch {torch.__version__}, {precision} product"
    if precision == "int8":
        a, b = (torch.randint(-127, 127, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t()), side, library
    dtype = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    x, y = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> object:
        with float32(tf32=precision == "tf32"):
            return x @ y

    return multiply, side, library


def _integer_product(side: int) -> Callable[[], object]:
    """A product of uint8 and constant int8 in ONNX Runtime, as which it runs int8 layers on x86 (VNNI has no other)."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 255, (side, side), dtype=np.uint8)
    y = generator.integers(-127, 127, (side, side), dtype=np.int8)
    node = helper.make_node("MatMulInteger", ["x", "y"], ["z"])
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [side, side])],
        [helper.make_tensor_value_info("z", TensorProto.INT32, [side, side])],
        [onnx.numpy_helper.from_array(y, "y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _best_seconds(call: Callable[[], object], device: str, seconds: float) -> float:
    """The shortest time of a call: a ceiling is what the machine can do, not what it mostly does."""
    timed = partial(_seconds_on_gpu if device == "cuda" else _seconds_on_cpu, call)
    for _ in range(2):
        timed()
    times = [timed()]
    while sum(times) < seconds or len(times) < 5:
        times.append(timed())
    return min(times)


def _seconds_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_gpu(call: Callable[[], object], calls: int = 10) -> float:
    """By the GPU's own events, without the host's launch and wait, over several calls that follow each other."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / calls
