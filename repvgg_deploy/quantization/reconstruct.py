"""One layer after another: its activation scale, its integers, its bias, on the inputs the quantized net really has."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.quantization.grid import INT8, Grid
from repvgg_deploy.quantization.layer_inputs import MEMORY_BYTES, Moments, Streams, input_moments, run_layer
from repvgg_deploy.quantization.pair_sums import count_taps
from repvgg_deploy.quantization.points import (
    BATCH,
    CLASSIFIER,
    POOL,
    Images,
    after_conv,
    fused_blocks,
    rebatch,
)
from repvgg_deploy.quantization.recipe import Recipe
from repvgg_deploy.quantization.rounding import (
    choose_weight_scales,
    quantize_activations,
    round_weights,
    round_with_feedback,
    scale_by_output,
)
from repvgg_deploy.quantization.state import LayerIntegers, QuantizationState, Reconstruction

Layer = nn.Conv2d | nn.Linear


@torch.no_grad()
def reconstruct(
    state: QuantizationState,
    images: Tensor,
    keep_float: Collection[str] = (),
    progress: Progress = SILENT,
    chained: bool = True,
) -> QuantizationState:
    """Quantize the layers in the order of execution; each makes up for the error of those before.

    Given: a `net` whose dead inputs are removed and whose channels are equalized, as far as the recipe says. Gives: the
    `result`.

    Args:
        state: its recipe's `scales` and `rounding` are used.
        images: those to reconstruct on (N, C, H, W), of `take_images`.
        keep_float: names of layers that are not quantized.
        progress: receives the step `rounding`, in layers.
        chained: without it each layer is quantized as if all the others were float.
    """
    net, recipe, grid = state.net, state.recipe, state.grid
    highest = grid.highest_of_points(net)
    streams = Streams(images, images)
    blocks = fused_blocks(net)
    layers: dict[str, LayerIntegers] = {}
    for index, (name, block) in enumerate(blocks):
        streams.highest = highest[name]
        if name in keep_float:
            _advance(streams, block, block.conv.weight, cast(Tensor, block.conv.bias))
        else:
            layers[name] = reconstruct_block(block, streams, recipe, index, grid=grid)
        if not chained:
            streams.rounded = streams.exact
        progress.step("rounding", index + 1, len(blocks) + 1)
    if CLASSIFIER in keep_float:
        return replace(state, result=Reconstruction(layers, None))
    streams.highest = highest[POOL]
    # Of what is pooled only the mean over the pixels counts; of a map every value.
    pool = choose_scale(streams, None if net.spec.maps else nn.Identity(), recipe)
    if not net.has_classifier:
        return replace(state, result=Reconstruction(layers, pool))
    if chained:
        streams.rounded = quantize_activations(streams.rounded, pool, streams.highest)
    streams = Streams(streams.exact.mean((2, 3)), streams.rounded.mean((2, 3)), highest[CLASSIFIER])
    scale = choose_scale(streams, net.classifier, recipe)
    streams.rounded = quantize_activations(streams.rounded, scale, streams.highest)
    layers[CLASSIFIER] = _quantize_layer(streams, net.classifier, scale, recipe, len(layers), grid)
    progress.step("rounding", len(blocks) + 1, len(blocks) + 1)
    return replace(state, result=Reconstruction(layers, pool))


@torch.no_grad()
def reconstruct_block(
    block: FusedBlock,
    streams: Streams,
    recipe: Recipe,
    index: int,
    scale: float | None = None,
    grid: Grid = INT8,
) -> LayerIntegers:
    """Quantize one block on the `streams` at its input, and move them to its output.

    `index` chooses the sampled pixels; `scale` is that of the block's input, where it is known already; `grid` has the
    integers of the weights.
    """
    scale = choose_scale(streams, block.conv, recipe) if scale is None else scale
    streams.rounded = quantize_activations(streams.rounded, scale, streams.highest)
    integers = _quantize_layer(streams, block.conv, scale, recipe, index, grid)
    advance(streams, block, integers)
    return integers


def advance(streams: Streams, block: FusedBlock, integers: LayerIntegers) -> None:
    """Move both streams past `block`, which has these integers in the quantized net."""
    _advance(streams, block, integers.dequantized(), integers.bias)


def _advance(streams: Streams, block: FusedBlock, weight: Tensor, bias: Tensor) -> None:
    """Move both streams past `block`; it has this weight and bias in the quantized net."""
    exact = partial(_run_block, block, block.conv.weight, cast(Tensor, block.conv.bias))
    streams.exact = _map_images(exact, streams.exact)
    streams.rounded = _map_images(partial(_run_block, block, weight, bias), streams.rounded)


def take_images(net: RepVGG, images: Images, count: int, most: int) -> Tensor:
    """Evenly spaced ones of `count` images, at most `most` and as many as the memory allows, where `net` is."""
    device = net.device
    kept: list[Tensor] = []
    wanted: set[int] = set()
    start = 0
    for batch in rebatch(images, device):
        if not wanted:
            # Two streams of float32; of very large images a few are kept all the same.
            most = min(most, max(16, MEMORY_BYTES // (2 * 4 * _widest(net, batch.shape))), count)
            wanted = {index * count // most for index in range(most)}
        kept.append(batch[[index for index in range(len(batch)) if start + index in wanted]])
        start += len(batch)
    return torch.cat(kept).contiguous(memory_format=torch.channels_last)


def _run_block(block: FusedBlock, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return after_conv(block, run_layer(block.conv, x, weight, bias))


def _map_images(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`function` of a few images at a time; the results are put together in place, without a second copy of them."""
    parts = torch.split(images, BATCH)
    first = function(parts[0])
    shape = (len(images), *first.shape[1:])
    results = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
    results[: len(first)] = first
    start = len(first)
    for part in parts[1:]:
        results[start : start + len(part)] = function(part)
        start += len(part)
    return results


def _widest(net: RepVGG, shape: torch.Size) -> int:
    """Values of the largest point for one image of this shape."""
    values, height, width = shape[1] * shape[2] * shape[3], shape[2], shape[3]
    for _, block in fused_blocks(net):
        height, width = -(-height // block.conv.stride[0]), -(-width // block.conv.stride[1])
        values = max(values, block.conv.out_channels * height * width)
    return int(values)


def choose_scale(streams: Streams, layer: nn.Module | None, recipe: Recipe) -> float:
    """The scale before `layer`, as float32 holds it; see `scale_by_output`."""
    scale = scale_by_output(streams, layer, recipe.scales.thresholds)
    # What the graph stores is float32.
    return float(torch.tensor(scale, dtype=torch.float32))


def _quantize_layer(
    streams: Streams, layer: Layer, scale: float, recipe: Recipe, index: int, grid: Grid
) -> LayerIntegers:
    options = recipe.rounding
    groups = input_moments(streams, layer, options.samples, recipe.seed + index)
    assert layer.bias is not None
    weights, biases = layer.weight.flatten(1).chunk(len(groups)), layer.bias.chunk(len(groups))
    fits = [_refit(weight, moments, options.damping) for weight, moments in zip(weights, groups, strict=True)]
    taps = count_taps(layer.weight)
    scales = _choose_weight_scales(fits, taps, grid)
    rows, shifted = [], []
    for group, (fit, chosen) in enumerate(zip(fits, scales.chunk(len(groups)), strict=True)):
        integers = fit.round(chosen, taps, grid)
        # The mean of every output channel becomes that of the float net.
        exact, rounded = (
            weights[group] @ groups[group].exact_mean,
            integers * chosen[:, None] @ groups[group].rounded_mean,
        )
        shifted.append(biases[group] + exact - rounded)
        rows.append(integers)
    integers = torch.cat(rows).reshape(layer.weight.shape).to(torch.int8)
    return LayerIntegers(integers, scales, torch.cat(shifted), scale)


@dataclass(frozen=True)
class _Fit:
    """The weights of one group refitted to the float net's output, and the damped covariance of its inputs.

    `covariance` is None where no input varies.
    """

    weight: Tensor
    covariance: Tensor | None

    @property
    def importance(self) -> Tensor:
        """What the error of each weight (filters, columns) counts."""
        if self.covariance is None:
            return torch.ones_like(self.weight)
        return self.covariance.diagonal().expand_as(self.weight)

    def round(self, scales: Tensor, taps: int, grid: Grid) -> Tensor:
        """Integers (filters, columns) for these scales (filters)."""
        if self.covariance is None:
            return round_weights(self.weight, scales, taps, grid=grid)
        return round_with_feedback(self.weight, scales, self.covariance, taps, grid)


def _refit(weight: Tensor, moments: Moments, damping: float) -> _Fit:
    strength = moments.covariance.diagonal()
    mean_strength = float(strength.mean())
    if mean_strength <= 0.0:
        return _Fit(weight, None)
    # As many samples as unknowns determine nothing: the fewer there are, the closer the answer stays to `weight`.
    damping = damping * weight.shape[1] / moments.samples * mean_strength
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    covariance = moments.covariance + max(damping, 1e-4 * mean_strength, moments.noise) * identity
    # Least squares of ‖W x − W′ x̂‖² + damping · ‖W′ − W‖², which is W + drift · (covariance + damping)⁻¹.
    return _Fit(weight + torch.linalg.solve(covariance, moments.drift.t()).t(), covariance)


def _choose_weight_scales(fits: list[_Fit], taps: int, grid: Grid) -> Tensor:
    """The scales (filters) of all groups together."""
    if len(fits) == 1:
        return choose_weight_scales(fits[0].weight, taps, fits[0].importance, grid)
    # In one call: a scale per tensor is that of all groups.
    weight, importance = torch.cat([fit.weight for fit in fits]), torch.cat([fit.importance for fit in fits])
    return choose_weight_scales(weight, taps, importance, grid)
