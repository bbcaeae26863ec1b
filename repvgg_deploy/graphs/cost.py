"""What a net or a graph has to compute and to move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import nn

ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Cost:
    """What a layer, or a net, takes for one batch.

    `flops` are operations, two per multiply-add. `bytes` are those that no implementation can avoid while layers run
    one after another: each convolution and linear layer reads its input and weights and writes its output once, and
    everything else is done on the way.
    """

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


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
