"""How the layers of a net become nodes: in float32 or float16, and for each activation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from torch import Tensor, nn

from repvgg_deploy.graphs.builder import Array, GraphBuilder
from repvgg_deploy.nets.activations import Activation

# IEEE 754 half precision: the largest number, the smallest normal one, and the largest magnitude that rounds to zero:
# half of the smallest subnormal, 2⁻²⁴, where the tie goes to the even neighbour, 0.
FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
FP16_ROUNDS_TO_ZERO = 2.0**-25


@dataclass
class Fp16Rounding:
    """What rounding to FP16 did to the weights: numbers of values."""

    values: int = 0
    subnormal: int = 0
    flushed_to_zero: int = 0
    overflowed: dict[str, float] = field(default_factory=dict)

    def round(self, name: str, array: Array) -> Array:
        """`array` in float16; what was lost is counted."""
        size = np.abs(array)
        self.values += array.size
        self.subnormal += int(((size < FP16_SMALLEST_NORMAL) & (size > FP16_ROUNDS_TO_ZERO)).sum())
        self.flushed_to_zero += int(((size <= FP16_ROUNDS_TO_ZERO) & (size > 0)).sum())
        largest = float(size.max(initial=0.0))
        # 65520 is the first value that rounds to infinity.
        if largest >= 65520.0:
            self.overflowed[name] = largest
            # In place of infinities: whoever makes the graph refuses it by `overflowed`.
            return np.zeros(array.shape, np.float16)
        return array.astype(np.float16)


class Layers(Protocol):
    """How the layers of the net become nodes; `x` and the returned string are names of tensors."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the tensors between the layers."""

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        """A convolution and its bias."""

    def activate(self, g: GraphBuilder, name: str, activation: Activation, x: str) -> str:
        """The activation at the end of the block `name`."""

    def read_map(self, g: GraphBuilder, reader: str | None, x: str) -> str:
        """The output of a block as the block `reader` reads it, None: as what follows the last block does."""

    def pool(self, g: GraphBuilder, name: str, x: str) -> str:
        """The mean over height and width, before the classifier."""

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        """The classifier."""


@dataclass
class FloatLayers:
    """Layers in float32 or float16."""

    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    rounding: Fp16Rounding = field(default_factory=Fp16Rounding)

    def value(self, g: GraphBuilder, name: str, tensor: Tensor) -> str:
        """A weight in the layers' type."""
        array = tensor.detach().numpy()
        return g.weight(
            name, self.rounding.round(name, array) if self.dtype == np.float16 else array.astype(self.dtype, copy=False)
        )

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        """A Conv node."""
        weight = self.value(g, f"{name}.weight", conv.weight)
        bias = self.value(g, f"{name}.bias", cast(Tensor, conv.bias))
        return add_conv(g, name, conv, [x, weight, bias])

    def activate(self, g: GraphBuilder, name: str, activation: Activation, x: str) -> str:
        """One node, or the few that the activation consists of."""
        return add_activation(g, name, activation, x, self.dtype)

    def read_map(self, g: GraphBuilder, reader: str | None, x: str) -> str:  # noqa: ARG002
        """`x` itself."""
        return x

    def pool(self, g: GraphBuilder, name: str, x: str) -> str:
        """A GlobalAveragePool node."""
        return g.add("GlobalAveragePool", [x], name)

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        """A Gemm node."""
        weight = self.value(g, f"{name}.weight", linear.weight)
        bias = self.value(g, f"{name}.bias", linear.bias)
        return g.add("Gemm", [x, weight, bias], name, transB=1)


def add_conv(g: GraphBuilder, name: str, conv: nn.Conv2d, inputs: list[str]) -> str:
    """A Conv node with the geometry of `conv` on `inputs` (x, weight, bias)."""
    pads = [int(p) for p in conv.padding]
    return g.add(
        "Conv",
        inputs,
        name,
        kernel_shape=list(conv.kernel_size),
        strides=list(conv.stride),
        pads=pads * 2,
        group=conv.groups,
    )


def add_activation(g: GraphBuilder, name: str, activation: Activation, x: str, dtype: np.dtype[Any]) -> str:
    """The nodes of an activation at the end of the block `name`, of operators that every opset from 13 on has.

    `dtype` is that of the tensors.
    """

    def number(part: str, value: float) -> str:
        return g.weight(f"{name}.{part}", np.asarray(value, dtype))

    output = f"{name}.{activation.name}"
    match activation.name:
        case "relu6":
            return g.add("Clip", [x, number("lowest", 0.0), number("highest", 6.0)], output)
        case "leaky_relu":
            return g.add("LeakyRelu", [x], output, alpha=activation.slope)
        case "elu":
            return g.add("Elu", [x], output, alpha=1.0)
        case "silu":
            return g.add("Mul", [x, g.add("Sigmoid", [x], f"{name}.sigmoid")], output)
        case "hardswish":
            gate = g.add("HardSigmoid", [x], f"{name}.hardsigmoid", alpha=1 / 6, beta=0.5)
            return g.add("Mul", [x, gate], output)
        case "mish":
            softplus = g.add("Softplus", [x], f"{name}.softplus")
            return g.add("Mul", [x, g.add("Tanh", [softplus], f"{name}.tanh")], output)
        case "gelu":
            # x/2·(1 + erf(x/√2)); the operator Gelu comes with opset 20 only.
            scaled = g.add("Mul", [x, number("root", 0.5**0.5)], f"{name}.scaled")
            shifted = g.add("Add", [g.add("Erf", [scaled], f"{name}.erf"), number("one", 1.0)], f"{name}.shifted")
            half = g.add("Mul", [x, number("half", 0.5)], f"{name}.half_x")
            return g.add("Mul", [half, shifted], output)
    return g.add("Relu", [x], f"{name}.relu")
