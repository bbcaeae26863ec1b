"""Rounding with error feedback: each column's error is made up for by the columns that are not rounded yet.

Minimizes the layer's output error (W − Q) H (W − Q)ᵀ for the covariance H of its inputs, column after column, in
closed form. Source: GPTQ (https://arxiv.org/abs/2210.17323), after Optimal Brain Surgeon.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repvgg_deploy.quantization.pair_sums import LEVELS, MOST, excess, neighbours

_BLOCK = 128


def round_with_feedback(weight: Tensor, scales: Tensor, covariance: Tensor, taps: int) -> Tensor:
    """Integers (filters, columns) whose product with `scales` gives nearly the output of `weight`.

    No pair of them can saturate; see `repvgg_deploy.quantization.pair_sums`.

    Args:
        weight: (filters, columns), float32.
        scales: (filters).
        covariance: (columns, columns), positive definite.
        taps: see `count_taps`.
    """
    # The columns with the strongest inputs first: the most columns are then left to make up for them.
    order = covariance.diagonal().argsort(descending=True)
    factor = _inverse_factor(covariance[order][:, order].double()).to(weight.dtype)
    partners = _partners(weight.shape[1], taps, order)
    variance = factor.diagonal().square().tolist()
    # Transposed, so that one column of the weights is contiguous.
    rest = weight[:, order].t().contiguous()
    rounded = torch.zeros_like(rest)
    for start in range(0, len(rest), _BLOCK):
        end = min(start + _BLOCK, len(rest))
        errors = torch.empty_like(rest[start:end])
        for k in range(start, end):
            rounded[k] = _round_column(k, rest, rounded, scales, partners[k], variance)
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
