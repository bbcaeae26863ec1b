"""The roofline: what a model has to compute and move, against what this machine can, measured here.

Source: Williams, Waterman, Patterson, "Roofline" (https://doi.org/10.1145/1498765.1498785).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from repvgg_deploy.errors import DeployError
from repvgg_deploy.runtime.onnxruntime import import_onnxruntime
from repvgg_deploy.torch_precision import float32

ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Cost:
    """What a layer, or a net, takes for one batch.

    `flops` are operations, two a multiply-add. `bytes` are those that no implementation can avoid as long as layers run
    one after another: each convolution and linear layer reads its input and weights and writes its output once, and
    everything else is done on the way.
    """

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


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


def net_costs(net: nn.Module, batch: int, shape: tuple[int, int, int], precision: str) -> dict[str, Cost]:
    """The cost of each convolution and linear layer of a torch net, by name, for `batch` inputs of (C, H, W).

    The net is run on the meta device, which computes nothing; it is not changed.
    """
    costs: dict[str, Cost] = {}
    size = ELEMENT_BYTES[precision]
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def add(layer: Any, inputs: Any, output: Any, name: str = name) -> None:
                flops = 2 * output.numel() * layer.weight[0].numel()
                costs[name] = Cost(flops, size * (inputs[0].numel() + layer.weight.numel() + output.numel()))

            hooks.append(module.register_forward_hook(add))
    try:
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in net.state_dict().items()}
        with torch.no_grad():
            torch.func.functional_call(net, meta, (torch.empty(batch, *shape, device="meta", dtype=_dtype(meta)),))
    finally:
        for hook in hooks:
            hook.remove()
    return costs


def _dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())


def graph_costs(model: onnx.ModelProto, batch: int, precision: str) -> dict[str, Cost]:
    """The cost of each Conv and Gemm of an ONNX graph, by the node's name, for `batch` inputs."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    sized.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    for output in sized.graph.output:
        # A declared batch would stand against the inferred one.
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(sized)
    shapes = {item.name: list(item.dims) for item in inferred.graph.initializer}
    for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        shapes[info.name] = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
    size = ELEMENT_BYTES[precision]
    costs = {}
    for node in inferred.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            x, weight, output = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
            flops = 2 * math.prod(output) * math.prod(weight[1:])
            costs[node.name] = Cost(flops, size * sum(map(math.prod, (x, weight, output))))
    return costs


def total_cost(costs: Mapping[str, Cost]) -> Cost:
    """Of all layers together."""
    return sum(costs.values(), Cost(0.0, 0.0))


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
