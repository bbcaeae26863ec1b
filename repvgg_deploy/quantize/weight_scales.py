"""Scales of weights: one a filter, chosen by the weighted square error of rounding to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127
"""Weights use −127…127, so that their negative is an int8 as well."""


def choose_weight_scales(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """The scale (filters) of each row of `weight` (filters, columns) with the least error of rounding.

    Args:
        weight: one row a filter.
        importance: of each column (filters, columns) or (columns), the mean square of its input; by default the same.
    """
    peak = weight.abs().amax(1).clamp_min(1e-30)
    best = torch.full_like(peak, torch.inf)
    scales = peak / LEVELS
    for share in torch.linspace(1.0, 0.4, 25, dtype=weight.dtype).tolist():
        scale = peak * (share / LEVELS)
        error = (round_weights(weight, scale) * scale[:, None] - weight).square()
        cost = (error if importance is None else error * importance).sum(1)
        better = cost < best
        best = torch.where(better, cost, best)
        scales = torch.where(better, scale, scales)
    return scales


def round_weights(weight: Tensor, scales: Tensor) -> Tensor:
    """The nearest integers −127…127 of `weight` (filters, columns) divided by `scales` (filters), as floats."""
    return (weight / scales[:, None]).round().clamp(-LEVELS, LEVELS)
