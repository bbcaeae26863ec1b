"""Scales of weights: one per filter, chosen by the weighted square error of rounding to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from repvgg_deploy.quantization.pair_sums import LEVELS, round_in_pairs


def choose_weight_scales(weight: Tensor, taps: int, importance: Tensor | None = None) -> Tensor:
    """The scale (filters) of each row of `weight` (filters, columns) with the least error of rounding.

    Args:
        weight: one row per filter.
        taps: see `count_taps`.
        importance: of each column (filters, columns) or (columns), the mean square of its input; by default the same.
    """
    # Above 1, the largest weight is not 127 steps: where two large ones are neighbours that costs less than clipping.
    shares = torch.cat([torch.linspace(2.0, 1.1, 10), torch.linspace(1.0, 0.4, 25)]).tolist()
    peak = weight.abs().amax(1).clamp_min(1e-30)
    best = torch.full_like(peak, torch.inf)
    scales = peak / LEVELS
    for share in shares:
        scale = peak * (share / LEVELS)
        error = (round_weights(weight, scale, taps, importance) * scale[:, None] - weight).square()
        cost = (error if importance is None else error * importance).sum(1)
        better = cost < best
        best = torch.where(better, cost, best)
        scales = torch.where(better, scale, scales)
    return scales


def round_weights(weight: Tensor, scales: Tensor, taps: int, importance: Tensor | None = None) -> Tensor:
    """The nearest allowed integers of `weight` (filters, columns) divided by `scales` (filters), as floats.

    See `round_in_pairs` for what is allowed and for the other arguments.
    """
    return round_in_pairs(weight / scales[:, None], taps, importance)
