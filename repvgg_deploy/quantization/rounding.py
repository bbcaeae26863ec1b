"""Scales of weights and activations, and weights rounded with error feedback.

Error feedback minimizes the layer's output error (W − Q) H (W − Q)ᵀ for the covariance H of its inputs, column after
column, in closed form: each column's error is made up for by the columns that are not rounded yet. Source: GPTQ
(https://arxiv.org/abs/2210.17323), after Optimal Brain Surgeon.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repvgg_deploy.quantization.grid import INT8, Grid
from repvgg_deploy.quantization.layer_inputs import Streams, run_layer
from repvgg_deploy.quantization.pair_sums import LEVELS, MOST, excess, neighbours, round_in_pairs
from repvgg_deploy.quantization.target import CLIPPING

# Columns that are rounded before the rest is updated in one matrix product.
_BLOCK = 128
# Images that an activation's scale is chosen on.
_IMAGES = 64


def round_with_feedback(weight: Tensor, scales: Tensor, covariance: Tensor, taps: int, grid: Grid = INT8) -> Tensor:
    """Integers (filters, columns) whose product with `scales` gives nearly the output of `weight`.

    With 8 bits no pair of them can saturate; see `repvgg_deploy.quantization.pair_sums`.

    Args:
        weight: (filters, columns), float32.
        scales: (filters).
        covariance: (columns, columns), positive definite.
        taps: see `count_taps`.
        grid: the integers to choose from.
    """
    # The columns with the strongest inputs first: the most columns are then left to make up for them.
    order = covariance.diagonal().argsort(descending=True)
    # Inverted in float64: with the least damping (see `_refit`) the condition number may reach 10⁴ times the number of
    # columns, at which float32 has no digit left.
    factor = _inverse_factor(covariance[order][:, order].double()).to(weight.dtype)
    partners = _partners(weight.shape[1], taps, order) if grid.in_pairs else []
    variance = factor.diagonal().square().tolist()
    # Transposed, so that one column of the weights is contiguous.
    rest = weight[:, order].t().contiguous()
    rounded = torch.zeros_like(rest)
    for start in range(0, len(rest), _BLOCK):
        end = min(start + _BLOCK, len(rest))
        errors = torch.empty_like(rest[start:end])
        for k in range(start, end):
            if partners:
                rounded[k] = _round_column(k, rest, rounded, scales, partners[k], variance)
            else:
                rounded[k] = (rest[k] / scales).round_().clamp_(-grid.levels, grid.levels)
            torch.div(rest[k] - rounded[k] * scales, factor[k, k], out=errors[k - start])
            rest[k + 1 : end] -= factor[k, k + 1 : end, None] * errors[k - start]
        rest[end:] -= factor[start:end, end:].t() @ errors
    return rounded.t()[:, order.argsort()]


def _inverse_factor(covariance: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = covariance⁻¹."""
    # Reversing rows and columns turns the Cholesky factor into the one that belongs to the inverse.
    lower = torch.linalg.cholesky(covariance.flip(0, 1))
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def _partners(columns: int, taps: int, order: Tensor) -> list[list[int]]:
    """For each place in `order`, the places of the columns that share a pair with the one there."""
    place = order.argsort().tolist()
    found: list[list[int]] = [[] for _ in place]
    numbers = torch.arange(columns).reshape(1, -1, taps)
    for first, second in neighbours(columns // taps, taps):
        for a, b in zip(numbers[first].flatten().tolist(), numbers[second].flatten().tolist(), strict=True):
            found[place[a]].append(place[b])
            found[place[b]].append(place[a])
    return found


def _round_column(
    k: int, rest: Tensor, rounded: Tensor, scales: Tensor, partners: list[int], variance: list[float]
) -> Tensor:
    """The integers (filters) of column `k`, with room for its partners, or in what they have left."""
    value = (rest[k] / scales).clamp_(-LEVELS, LEVELS)
    for partner in partners:
        if partner > k:
            other = (rest[partner] / scales).clamp_(-LEVELS, LEVELS)
            # The cost of moving a column by e is (e / U_kk)²: that decides how the two share what is too much.
            share = variance[k] / (variance[k] + variance[partner])
            value -= value.sign() * excess(value, other) * share
    value.round_()
    for partner in partners:
        if partner < k:
            used = rounded[partner]
            value = torch.minimum(torch.maximum(value, -MOST - used.clamp_max(0)), MOST - used.clamp_min(0))
    return value


def choose_weight_scales(weight: Tensor, taps: int, importance: Tensor | None = None, grid: Grid = INT8) -> Tensor:
    """The scale (filters) of each row of `weight` (filters, columns) with the least error of rounding.

    Args:
        weight: one row per filter.
        taps: see `count_taps`.
        importance: of each column (filters, columns) or (columns), the mean square of its input; by default the same.
        grid: the integers to choose from.
    """
    peak = weight.abs().amax(1)
    if grid.per_tensor:
        peak = peak.amax().expand(len(weight))
    # A filter of zeros needs a scale above 0; `bias_headroom` gives it one that its bias fits.
    peak = peak.clamp_min(1e-30)
    best = torch.full_like(peak, torch.inf)
    scales = peak / grid.levels
    for share in _shares(grid):
        scale = peak * (share / grid.levels)
        error = (round_weights(weight, scale, taps, importance, grid) * scale[:, None] - weight).square()
        cost = (error if importance is None else error * importance).sum(1)
        if grid.per_tensor:
            cost = cost.sum().expand(len(weight))
        better = cost < best
        best = torch.where(better, cost, best)
        scales = torch.where(better, scale, scales)
    return scales


def _shares(grid: Grid) -> list[float]:
    """The shares of the largest weight that are tried as the largest integer."""
    if grid.is_int8:
        # Above 1, the largest weight is not 127 steps: where two large ones are neighbours that costs less than
        # clipping.
        return torch.cat([torch.linspace(2.0, 1.1, 10), torch.linspace(1.0, 0.4, 25)]).tolist()
    # Where one scale serves all filters, the best may be far below the largest weight of the one with outliers.
    return torch.logspace(0, -1.5, 60).tolist()


def round_weights(
    weight: Tensor, scales: Tensor, taps: int, importance: Tensor | None = None, grid: Grid = INT8
) -> Tensor:
    """The nearest allowed integers of `weight` (filters, columns) divided by `scales` (filters), as floats.

    See `round_in_pairs` for what is allowed with 8 bits and for the other arguments.
    """
    if grid.in_pairs:
        return round_in_pairs(weight / scales[:, None], taps, importance)
    return (weight / scales[:, None]).round_().clamp_(-grid.levels, grid.levels)


def quantize_activations(x: Tensor, scale: float, highest: int = CLIPPING) -> Tensor:
    """`x` rounded (half to even) and saturated with this scale, as floats that integer · scale gives."""
    return (x / scale).round_().clamp_(-highest - 1, highest).mul_(scale)


def output_error(streams: Streams, layer: nn.Module | None, scale: float) -> float:
    """The square error of `layer`'s output where its input is quantized; a constant offset per channel is not counted.

    `layer` is a convolution or linear layer, None for the values themselves, or anything else for the mean over height
    and width.
    """
    exact, rounded = streams.exact, quantize_activations(streams.rounded, scale, streams.highest)
    if isinstance(layer, nn.Conv2d | nn.Linear):
        difference = run_layer(layer, rounded - exact, layer.weight, None)
    else:
        difference = rounded - exact if layer is None else (rounded - exact).mean((2, 3))
    weights = streams.image_weights()[:, None]
    flat = difference.flatten(2) if difference.dim() > 2 else difference.unsqueeze(2)
    # The mean is what bias correction removes.
    mean = (flat.mean(2) * weights).sum(0) / weights.sum()
    return float(((flat - mean[:, None]).square().sum((1, 2)) * weights[:, 0]).double().sum())


def scale_by_output(streams: Streams, layer: nn.Module | None, thresholds: tuple[float, ...]) -> float:
    """The scale with the least output error; `thresholds` are shares of the largest input that images usually have.

    The usual one is the largest of those images that count in full (see `Streams.image_weights`).

    A signed input (the images) is never clipped: its values are bounded, and as frequent at the border as elsewhere.
    """
    usual = streams.image_weights() >= 1.0
    largest = float(streams.rounded[usual].abs().amax())
    if largest == 0.0:
        # Any positive scale holds zeros.
        return 1.0 / streams.highest
    if float(streams.rounded.amin()) < 0:
        return largest / streams.highest
    sample = streams.thinned(_IMAGES)
    # From the largest on: of equal errors the one that clips the least is taken.
    scales = [largest * share / streams.highest for share in sorted(thresholds, reverse=True)]
    return min(scales, key=lambda scale: output_error(sample, layer, scale))
