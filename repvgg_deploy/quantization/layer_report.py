"""What quantization did to each layer, as rows of a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from repvgg_deploy.quantization.layer_inputs import run_layer
from repvgg_deploy.quantization.points import CLASSIFIER, POOL, after_conv, fused_blocks
from repvgg_deploy.quantization.rounding import quantize_activations
from repvgg_deploy.quantization.state import LayerIntegers, QuantizationState, RemovedInputs


@dataclass(frozen=True)
class LayerRow:
    """One layer. The signal-to-noise ratios are in dB on calibration images; `saturation` is a share of the inputs.

    `weights_db` compares the int8 weights with the prepared float ones, `activations_db` the input before and after
    its rounding, `output_db` the layer's output with that of the float net, with the error of all layers before.
    A layer that stays float has no scale.
    """

    name: str
    kept_float: bool
    scale: float | None
    saturation: float | None
    weights_db: float | None
    activations_db: float | None
    output_db: float
    removed_columns: int
    removed_bound: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def signal_to_noise_db(signal: Tensor, noisy: Tensor) -> float:
    """10·log₁₀ of the signal's energy over that of the difference; infinite where there is none."""
    noise = float((noisy - signal).detach().double().square().sum())
    power = float(signal.detach().double().square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(power / noise) if power > 0 else -math.inf


@torch.no_grad()
def report_layers(state: QuantizationState, images: Tensor) -> tuple[LayerRow, ...]:
    """One row per layer of the prepared net of `state`, measured on a few `images` (N, C, H, W)."""
    net, result, removed = state.net, state.integers, state.removed
    highest = state.grid.highest_of_points(net)
    rows: list[LayerRow] = []
    exact = rounded = images
    for name, block in fused_blocks(net):
        exact_out = block.conv(exact)
        place = _Place(name, block.conv, highest[name])
        row, rounded_out = _row(place, result.layers.get(name), rounded, exact_out, removed.get(name))
        rows.append(row)
        exact, rounded = after_conv(block, exact_out), after_conv(block, rounded_out)
    if result.pool_scale is not None:
        quantized = quantize_activations(rounded, result.pool_scale, highest[POOL])
        db = signal_to_noise_db(exact.mean((2, 3)), quantized.mean((2, 3)))
        scale, clipped = result.pool_scale, _saturation(rounded, result.pool_scale, highest[POOL])
        noise = signal_to_noise_db(rounded, quantized)
        rows.append(LayerRow(POOL, False, scale, clipped, None, noise, db, 0, 0.0))
        rounded = quantized
    if not net.has_classifier:
        return tuple(rows)
    exact, rounded = exact.mean((2, 3)), rounded.mean((2, 3))
    out = net.classifier(exact)
    place = _Place(CLASSIFIER, net.classifier, highest[CLASSIFIER])
    rows.append(_row(place, result.layers.get(CLASSIFIER), rounded, out, None)[0])
    return tuple(rows)


@dataclass(frozen=True)
class _Place:
    """A layer, and the integer of the clipping threshold of its input."""

    name: str
    layer: nn.Conv2d | nn.Linear
    highest: int


def _row(
    place: _Place,
    integers: LayerIntegers | None,
    x: Tensor,
    exact: Tensor,
    removed: RemovedInputs | None,
) -> tuple[LayerRow, Tensor]:
    name, layer = place.name, place.layer
    columns, bound = (removed.columns, removed.bound) if removed is not None else (0, 0.0)
    if integers is None:
        out = cast(Tensor, layer(x))
        return LayerRow(name, True, None, None, None, None, signal_to_noise_db(exact, out), columns, bound), out
    quantized = quantize_activations(x, integers.input_scale, place.highest)
    weight = integers.dequantized()
    out = run_layer(layer, quantized, weight, integers.bias)
    row = LayerRow(
        name,
        False,
        integers.input_scale,
        _saturation(x, integers.input_scale, place.highest),
        signal_to_noise_db(layer.weight, weight),
        signal_to_noise_db(x, quantized),
        signal_to_noise_db(exact, out),
        columns,
        bound,
    )
    return row, out


def _saturation(x: Tensor, scale: float, highest: int) -> float:
    # Up to half a step above it a value still rounds to the threshold.
    return float((x.abs() > (highest + 0.5) * scale).double().mean())
