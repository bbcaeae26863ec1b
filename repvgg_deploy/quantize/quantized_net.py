"""`QuantizedNet`: a torch module that computes what the Q/DQ graph computes, integer for integer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantize.activation_scales import HIGHEST, LOWEST
from repvgg_deploy.quantize.edges import CLASSIFIER, after_conv, fused_blocks, geometry, per_channel
from repvgg_deploy.quantize.layer_report import LayerRow
from repvgg_deploy.quantize.reconstruct import LayerIntegers, Reconstruction


@dataclass(frozen=True)
class QuantizationSummary:
    """How a net was quantized: the recipe's name, the calibration images, and one row a layer."""

    recipe: str
    images: int
    images_sha256: str
    seed: int
    layers: tuple[LayerRow, ...]


class IntegerLayer(nn.Module):
    """A convolution or linear layer on int8 inputs: integers in, float32 out.

    The sum of products is exact in float32 as long as it stays below 2²⁴, and then scaled once.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    input_scale: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, integers: LayerIntegers) -> None:
        super().__init__()
        self.geometry = geometry(layer) if isinstance(layer, nn.Conv2d) else None
        self.register_buffer("weight", integers.weight.clone())
        self.register_buffer("weight_scale", integers.weight_scale.clone())
        self.register_buffer("bias", integers.bias.clone())
        self.register_buffer("input_scale", torch.tensor(integers.input_scale, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """`x` float32, before it is quantized."""
        return self.accumulate(to_integers(x, self.input_scale))

    def accumulate(self, integers: Tensor) -> Tensor:
        """The layer's output for quantized inputs −128…127, given as floats."""
        weight = self.weight.to(integers.dtype)
        scale = self.weight_scale * self.input_scale
        if self.geometry is None:
            return F.linear(integers, weight) * scale + self.bias
        total = F.conv2d(integers, weight, **self.geometry)
        return total * per_channel(scale, total[0]) + per_channel(self.bias, total[0])

    def integers(self) -> LayerIntegers:
        """The layer's values."""
        return LayerIntegers(self.weight, self.weight_scale, self.bias, float(self.input_scale))


def to_integers(x: Tensor, scale: Tensor) -> Tensor:
    """QuantizeLinear with zero-point 0: round half to even, saturate to −128…127; the result as floats."""
    return (x / scale).round().clamp(LOWEST, HIGHEST)


class QuantizedNet(nn.Module):
    """A fused RepVGG whose layers are int8 where `layers` has them, and float elsewhere.

    Input normalized images (N, C, H, W), output logits (N, classes). `float_net` is the prepared net (equalized, dead
    inputs removed), with the geometry, the squeeze-excites and the layers that stay float.
    """

    def __init__(self, float_net: RepVGG, result: Reconstruction, summary: QuantizationSummary | None = None) -> None:
        super().__init__()
        self.float_net = float_net
        self.summary = summary
        self.layers = nn.ModuleDict()
        for name, block in fused_blocks(float_net):
            if name in result.layers:
                self.layers[_key(name)] = IntegerLayer(block.conv, result.layers[name])
        if CLASSIFIER in result.layers:
            self.layers[CLASSIFIER] = IntegerLayer(float_net.classifier, result.layers[CLASSIFIER])
        scale = None if result.pool_scale is None else torch.tensor(result.pool_scale, dtype=torch.float32)
        self.pool_scale: Tensor | None
        self.register_buffer("pool_scale", scale)
        self.requires_grad_(False)
        self.eval()

    def integer_layer(self, name: str) -> IntegerLayer | None:
        """The quantized layer of that name, or None where it stays float."""
        return cast(IntegerLayer, self.layers[_key(name)]) if _key(name) in self.layers else None

    def float_layers(self) -> tuple[str, ...]:
        """The names of the layers that stay float."""
        names = [*(name for name, _ in fused_blocks(self.float_net)), CLASSIFIER]
        return tuple(name for name in names if self.integer_layer(name) is None)

    def integers(self) -> Mapping[str, LayerIntegers]:
        """The values of all quantized layers, by name."""
        names = [*(name for name, _ in fused_blocks(self.float_net)), CLASSIFIER]
        found = ((name, self.integer_layer(name)) for name in names)
        return {name: layer.integers() for name, layer in found if layer is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        for name, block in fused_blocks(self.float_net):
            layer = self.integer_layer(name)
            x = after_conv(block, block.conv(x) if layer is None else layer(x))
        if self.pool_scale is not None:
            x = to_integers(x, self.pool_scale) * self.pool_scale
        x = x.mean((2, 3))
        classifier = self.integer_layer(CLASSIFIER)
        return cast(Tensor, self.float_net.classifier(x) if classifier is None else classifier(x))

    def edge_integers(self, x: Tensor) -> dict[str, Tensor]:
        """The integers on every quantized edge for images `x`, as floats: what QuantizeLinear gives in the graph."""
        seen: dict[str, Tensor] = {}
        for name, block in fused_blocks(self.float_net):
            layer = self.integer_layer(name)
            if layer is not None:
                seen[name] = to_integers(x, layer.input_scale)
            x = after_conv(block, block.conv(x) if layer is None else layer.accumulate(seen[name]))
        classifier = self.integer_layer(CLASSIFIER)
        if self.pool_scale is not None and classifier is not None:
            seen["pool"] = to_integers(x, self.pool_scale)
            x = (seen["pool"] * self.pool_scale).mean((2, 3))
            seen[CLASSIFIER] = to_integers(x, classifier.input_scale)
        return seen


def _key(name: str) -> str:
    return name.replace(".", "_")
