"""What the passes of quantization hand over to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.grid import INT8, Grid
from repvgg_deploy.quantization.points import layer_names, per_channel
from repvgg_deploy.quantization.recipe import Recipe
from repvgg_deploy.quantization.statistics import CalibrationStatistics


@dataclass(frozen=True)
class RemovedInputs:
    """What was removed from one layer: dead input channels, and kernel columns in which a weight was removed.

    `bound` is the largest change of any output of the layer on the calibration images, in shares of that output's root
    mean square; it is proved from the channels' ranges, not measured.
    """

    channels: int
    columns: int
    bound: float


@dataclass(frozen=True)
class LayerIntegers:
    """What a quantized layer consists of.

    `weight` is int8 of the layer's shape, `weight_scale` (filters) and `bias` (filters) are float32; `input_scale` is
    that of the point in front.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    input_scale: float

    def dequantized(self) -> Tensor:
        """The float weights that the integers stand for."""
        return self.weight.float() * per_channel(self.weight_scale, self.weight)


@dataclass(frozen=True)
class Reconstruction:
    """All quantized layers by name, and the scale before the pool (None if the classifier stays float)."""

    layers: dict[str, LayerIntegers]
    pool_scale: float | None

    def float_layers(self, net: RepVGG) -> tuple[str, ...]:
        """The names of the layers of `net` that stay float."""
        return tuple(name for name in layer_names(net) if name not in self.layers)


@dataclass(frozen=True)
class QuantizationState:
    """What each pass is given and gives. No pass changes the state that it is given, nor a tensor in it.

    Attributes:
        net: in deploy form and float; some passes rewrite it, and the integers stand for what it computes.
        statistics: of the net before the first pass, on the calibration images.
        recipe: what every pass takes its options from.
        grid: the integers that weights and activations are rounded to.
        removed: the dead inputs of each layer, from `remove_dead_inputs`.
        factors: by which the channels of each point were divided, from `equalize`.
        result: the integers, from `reconstruct` on.
    """

    net: RepVGG
    statistics: CalibrationStatistics
    recipe: Recipe
    grid: Grid = INT8
    removed: Mapping[str, RemovedInputs] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    result: Reconstruction | None = None

    @property
    def integers(self) -> Reconstruction:
        """The `result`, which `reconstruct` has given by now."""
        if self.result is None:
            raise AssertionError("the pass comes before reconstruct")
        return self.result
