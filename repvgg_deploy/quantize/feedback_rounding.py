"""Rounding with error feedback: each column's error is made up for by the columns that are not rounded yet.

Minimizes the layer's output error (W − Q) H (W − Q)ᵀ for the covariance H of its inputs, column after column, in
closed form. Source: GPTQ (https://arxiv.org/abs/2210.17323), after Optimal Brain Surgeon.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repvgg_deploy.quantize.weight_scales import LEVELS

_BLOCK = 128


def round_with_feedback(weight: Tensor, scales: Tensor, covariance: Tensor) -> Tensor:
    """Integers −127…127 (filters, columns) whose product with `scales` gives nearly the output of `weight`.

    Args:
        weight: (filters, columns), float32.
        scales: (filters).
        covariance: (columns, columns), positive definite.
    """
    # The columns with the strongest inputs first: the most columns are then left to make up for them.
    order = covariance.diagonal().argsort(descending=True)
    factor = _inverse_factor(covariance[order][:, order].double()).to(weight.dtype)
    rest = weight[:, order].clone()
    rounded = torch.zeros_like(rest)
    columns = rest.shape[1]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        rounded[:, start:end], errors = _round_block(rest[:, start:end], scales, factor[start:end, start:end])
        rest[:, end:] -= errors @ factor[start:end, end:]
    return rounded[:, order.argsort()]


def _inverse_factor(covariance: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = covariance⁻¹."""
    # Reversing rows and columns turns the Cholesky factor into the one that belongs to the inverse.
    lower = torch.linalg.cholesky(covariance.flip(0, 1))
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def _round_block(columns: Tensor, scales: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    # Transposed, so that one column of the weights is contiguous.
    rest = columns.t().contiguous()
    rounded, errors = torch.empty_like(rest), torch.empty_like(rest)
    for k in range(len(rest)):
        torch.round(rest[k] / scales, out=rounded[k])
        rounded[k].clamp_(-LEVELS, LEVELS)
        torch.div(rest[k] - rounded[k] * scales, factor[k, k], out=errors[k])
        rest[k + 1 :] -= factor[k, k + 1 :, None] * errors[k]
    return rounded.t(), errors.t()
