"""`QuantizedNet`: a torch module that computes what the Q/DQ graph computes, integer for integer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG
from repvgg_deploy.quantization.data_free import PictureSummary
from repvgg_deploy.quantization.layer_report import LayerRow
from repvgg_deploy.quantization.points import CLASSIFIER, POOL, after_conv, fused_blocks, geometry, layer_names
from repvgg_deploy.quantization.state import LayerIntegers, Reconstruction
from repvgg_deploy.quantization.target import (
    CLIPPING,
    LOWEST,
    UNSIGNED_HIGHEST,
    highest_integers,
    is_plain,
    unsigned_points,
)


@dataclass(frozen=True)
class QuantizationSummary:
    """How a net was quantized: the recipe's name, the calibration images, and one row per layer.

    Without images `images` is 0, and `pictures` says what was made in their place. `trained_steps` are those of `qat`,
    where the scales were learned; nothing was calibrated then. `warnings` are what a user should know of the
    calibration. With `full_range` activations after a ReLU go to 255, which TensorRT does not have.
    """

    recipe: str
    images: int
    images_sha256: str
    seed: int
    layers: tuple[LayerRow, ...]
    pictures: PictureSummary | None = None
    trained_steps: int | None = None
    warnings: tuple[str, ...] = ()
    full_range: bool = False

    @property
    def calibrated_on(self) -> str:
        """The calibration images in a few words."""
        if self.trained_steps is not None:
            return f"scales that qat learned in {self.trained_steps} steps"
        made = self.pictures
        if made is None:
            return f"{self.images} images"
        return f"no images ({made.pictures} images of {made.height}x{made.width}, synthesized from BN statistics)"


class IntegerLayer(nn.Module):
    """A convolution or linear layer on eight-bit inputs: integers in, float32 out.

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
        # Beside the weights: a GPU divides by a scale that is on the CPU by multiplying with its reciprocal, which
        # rounds another way.
        scale = torch.tensor(integers.input_scale, dtype=torch.float32, device=integers.weight.device)
        self.register_buffer("input_scale", scale)
        # An integer convolution holds its bias in units of its sums; a float one then computes the same.
        self.register_buffer("bias", (integers.bias / self.scale).round() * self.scale)

    @property
    def scale(self) -> Tensor:
        """What one unit of the sums is worth, per filter."""
        return self.weight_scale * self.input_scale

    def total(self, integers: Tensor) -> Tensor:
        """Sums of products and bias, whole numbers as floats, for integers given as floats."""
        weight = self.weight.to(integers.dtype)
        bias = (self.bias / self.scale).round()
        if self.geometry is None:
            return F.linear(integers, weight) + bias
        return F.conv2d(integers, weight, **self.geometry) + bias[:, None, None]

    def forward(self, integers: Tensor) -> Tensor:
        """The layer's float32 output for integers given as floats."""
        total = self.total(integers)
        return total * (self.scale if self.geometry is None else self.scale[:, None, None])

    def requantized(self, integers: Tensor, scale: Tensor) -> Tensor:
        """The convolution's output in steps of `scale`, rounded, not saturated.

        As an integer convolution does it: one factor from the sums to the next integers.
        """
        return (self.total(integers) * (self.scale / scale)[:, None, None]).round()

    def integers(self) -> LayerIntegers:
        """The layer's values."""
        return LayerIntegers(self.weight, self.weight_scale, self.bias, float(self.input_scale))


def to_integers(x: Tensor, scale: Tensor, highest: int) -> Tensor:
    """QuantizeLinear with zero-point 0: round half to even, saturate to −128…`highest`; the result as floats."""
    return (x / scale).round().clamp(LOWEST, highest)


class QuantizedNet(nn.Module):
    """A fused RepVGG whose layers are int8 where `layers` has them, and float elsewhere.

    Input normalized images (N, C, H, W), output as that of `float_net`, as ONNX Runtime computes them from the graph;
    see `as_tensorrt`. `float_net` is the prepared net (equalized, dead inputs removed), with the geometry, the
    squeeze-excites and the layers that stay float.

    Example:
        >>> from repvgg_deploy import build, fuse, load_checkpoint, load_recipe, quantize
        >>> int8 = quantize(fuse(build(load_checkpoint("net.pth"))), [torch.randn(32, 3, 64, 64)], load_recipe("fast"))
        >>> int8.integers()["classifier"].weight.dtype
        torch.int8
    """

    def __init__(
        self,
        float_net: RepVGG,
        result: Reconstruction,
        summary: QuantizationSummary | None = None,
    ) -> None:
        super().__init__()
        self.float_net = float_net
        self.summary = summary
        self.unsigned = unsigned_points(float_net)
        self._highest = highest_integers(float_net, UNSIGNED_HIGHEST)
        self.layers = nn.ModuleDict()
        for name, block in fused_blocks(float_net):
            if name in result.layers:
                self.layers[_key(name)] = IntegerLayer(block.conv, result.layers[name])
        if CLASSIFIER in result.layers:
            self.layers[CLASSIFIER] = IntegerLayer(float_net.classifier, result.layers[CLASSIFIER])
        scale = None if result.pool_scale is None else torch.tensor(result.pool_scale, device=float_net.device)
        self.pool_scale: Tensor | None
        self.register_buffer("pool_scale", scale)
        self.requires_grad_(False)
        self.eval()

    def as_tensorrt(self) -> QuantizedNet:
        """The net as TensorRT computes it from the same graph: int8 activations, which saturate at 127."""
        # Shallow: both have the same layers, and differ only in where activations saturate.
        net = copy.copy(self)
        net._highest = highest_integers(self.float_net, CLIPPING)
        return net

    def integer_layer(self, name: str) -> IntegerLayer | None:
        """The quantized layer of that name, or None if it stays float."""
        return cast(IntegerLayer, self.layers[_key(name)]) if _key(name) in self.layers else None

    def float_layers(self) -> tuple[str, ...]:
        """The names of the layers that stay float."""
        return tuple(name for name in layer_names(self.float_net) if self.integer_layer(name) is None)

    def integers(self) -> Mapping[str, LayerIntegers]:
        """The values of all quantized layers, by name."""
        found = ((name, self.integer_layer(name)) for name in layer_names(self.float_net))
        return {name: layer.integers() for name, layer in found if layer is not None}

    def point_scale(self, name: str) -> Tensor | None:
        """The scale of a point, or None if it is not quantized."""
        if name == POOL:
            return self.pool_scale
        layer = self.integer_layer(name)
        return None if layer is None else layer.input_scale

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes), or of a backbone the pooled features (N, C)."""
        return self._run(x, {}, {})

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """All that the net gives, by the names of `ArchSpec.output_names`."""
        maps: dict[str, Tensor] = {}
        pooled = self._run(x, {}, maps)
        return maps or {self.float_net.spec.output_names[0]: pooled}

    def point_integers(self, x: Tensor) -> dict[str, Tensor]:
        """The integers at every quantized point for images `x`, as floats: what QuantizeLinear gives in the graph."""
        seen: dict[str, Tensor] = {}
        self._run(x, seen, {})
        return seen

    def _run(self, x: Tensor, seen: dict[str, Tensor], maps: dict[str, Tensor]) -> Tensor:
        """The output; the integers of each point go to `seen`, and the maps that the net gives to `maps`."""
        blocks = fused_blocks(self.float_net)
        readers = [*(name for name, _ in blocks[1:]), POOL]
        flow = _Flow(x)
        for (name, block), reader in zip(blocks, readers, strict=True):
            layer = self.integer_layer(name)
            if layer is None:
                flow = _Flow(after_conv(block, block.conv(flow.values)))
            else:
                seen[name] = flow.integers_with(layer.input_scale, self._highest[name])
                flow = self._run_layer(block, layer, seen[name], reader)
            if name in self.float_net.map_names:
                maps[self.float_net.map_names[name]] = self._as_read(flow, reader)
        return self._run_head(flow, seen)

    def _run_layer(self, block: FusedBlock, layer: IntegerLayer, integers: Tensor, reader: str) -> _Flow:
        scale = self.point_scale(reader)
        # Whatever else stands between the sums and the next QuantizeLinear is float in the graph, and so is what it
        # reads.
        if scale is None or not is_plain(block):
            return _Flow(after_conv(block, layer(integers)))
        # From 0 on, which is the ReLU.
        rounded = layer.requantized(integers, scale).clamp(0, self._highest[reader])
        return _Flow(rounded * scale, rounded)

    def _as_read(self, flow: _Flow, reader: str) -> Tensor:
        """The values at a point as the layer after it reads them."""
        scale = self.point_scale(reader)
        return flow.values if scale is None else flow.integers_with(scale, self._highest[reader]) * scale

    def _run_head(self, flow: _Flow, seen: dict[str, Tensor]) -> Tensor:
        classifier = self.integer_layer(CLASSIFIER)
        if not self.float_net.has_classifier:
            return self.float_net.head(self._as_read(flow, POOL))
        if self.pool_scale is None or classifier is None:
            return self.float_net.head(flow.values)
        seen[POOL] = flow.integers_with(self.pool_scale, self._highest[POOL])
        pixels = seen[POOL].shape[2] * seen[POOL].shape[3]
        # As QLinearGlobalAveragePool: the sum of the integers is exact, and one factor leads to the classifier's.
        factor = self.pool_scale / (classifier.input_scale * pixels)
        means = (seen[POOL].sum((2, 3)) * factor).round()
        seen[CLASSIFIER] = means.clamp(LOWEST, self._highest[CLASSIFIER])
        return cast(Tensor, classifier(seen[CLASSIFIER]))


@dataclass(frozen=True)
class _Flow:
    """What flows through a quantization point: float values, and the integers behind them where they are known."""

    values: Tensor
    known: Tensor | None = None

    def integers_with(self, scale: Tensor, highest: int) -> Tensor:
        return to_integers(self.values, scale, highest) if self.known is None else self.known


def _key(name: str) -> str:
    # A ModuleDict refuses names with dots.
    return name.replace(".", "_")
