"""Weights whose input is dead or constant: removed, because one outlier there sets the scale of a whole filter.

An identity branch after a channel that is (nearly) always the same has a tiny σ, so γ/σ puts an enormous weight on an
input that does not vary: on 0 the weight does nothing, and on another constant it is a bias.
Source: "Make RepVGG Greater Again: A Quantization-Aware Approach", section 3 (https://arxiv.org/abs/2212.01593).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from repvgg_deploy.quantization.points import fused_blocks
from repvgg_deploy.quantization.state import QuantizationState, RemovedInputs
from repvgg_deploy.quantization.statistics import PointStatistics


@torch.no_grad()
def remove_dead_inputs(state: QuantizationState) -> QuantizationState:
    """Set to zero the weights that cannot matter on the calibration images.

    Given: a `net` that computes what `statistics` were taken of. Gives: a `net` that computes the same on those images,
    within the recipe's share `dead_inputs`, and what was `removed` of each layer; nothing new if that is None.

    The weight W[o, i, tap] changes output o by at most |W|·max|xᵢ|. At the kernel's centre, which never sees the
    padding, the middle of xᵢ's range goes into the bias, and what is left is |W|·(max xᵢ − min xᵢ)/2. Weights are
    removed from the smallest change on, for as long as the sum of these bounds stays below the share of the output's
    root mean square, and only where a weight is larger than every kept one: small weights cost nothing.
    """
    share = state.recipe.dead_inputs
    if share is None:
        return state
    net, points = copy.deepcopy(state.net), state.statistics.points
    removed = {name: remove_dead_columns(block.conv, points[name], share) for name, block in fused_blocks(net)}
    return replace(state, net=net, removed=removed)


@torch.no_grad()
def remove_dead_columns(conv: nn.Conv2d, point: PointStatistics, share: float) -> RemovedInputs:
    """The same for one convolution and the statistics of its input; changes `conv`."""
    weight = conv.weight
    taps = weight[0, 0].numel()
    center = _center(conv)
    lowest, highest, square = (
        _inputs_of_filters(torch.as_tensor(values, device=weight.device), conv)[:, :, None].repeat(1, 1, taps)
        for values in (point.lowest, point.highest, point.mean_square)
    )
    reach = torch.maximum(lowest.abs(), highest.abs())
    folded = torch.zeros_like(reach)
    if center is not None:
        folded[:, :, center] = (lowest[:, :, center] + highest[:, :, center]) / 2
        reach[:, :, center] = (highest[:, :, center] - lowest[:, :, center]) / 2
    values = weight.double().flatten(2)
    # What an output does beyond its constant part; inputs are taken as independent, for the order of magnitude.
    variance = (values**2 * (square - folded**2).clamp_min(0.0)).sum((1, 2), keepdim=True)
    relative = values.abs() * reach / variance.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    gone = _largest_that_may_go(values.abs().flatten(1), relative.flatten(1), share).reshape(values.shape)
    if conv.bias is not None:
        conv.bias += (values * folded * gone).sum((1, 2)).to(weight.dtype)
    weight.masked_fill_(gone.reshape(weight.shape), 0.0)
    change = float((relative * gone).sum((1, 2)).max())
    dead = int((point.largest == 0).sum()) if bool(gone.any()) else 0
    return RemovedInputs(dead, int(gone.any(2).sum()), change)


def _largest_that_may_go(size: Tensor, relative: Tensor, share: float) -> Tensor:
    """Which weights (filters, weights) are larger than all that must stay, and together change at most `share`."""
    order = relative.argsort(1)
    total = relative.gather(1, order).cumsum(1)
    small = torch.zeros_like(relative, dtype=torch.bool).scatter_(1, order, total <= share)
    needed = torch.where(small, torch.zeros_like(size), size).amax(1, keepdim=True)
    return small & (size > needed)


def _center(conv: nn.Conv2d) -> int | None:
    """The index of the tap that reads no padding, or None if every tap may."""
    height, width = conv.kernel_size
    if height % 2 == 0 or width % 2 == 0 or conv.padding != (height // 2, width // 2) or conv.dilation != (1, 1):
        return None
    return height // 2 * width + width // 2


def _inputs_of_filters(values: Tensor, conv: nn.Conv2d) -> Tensor:
    """Per-channel values (C) as (filters, C / groups): what each column of each filter reads."""
    grouped = values.reshape(conv.groups, -1)
    return grouped.repeat_interleave(conv.out_channels // conv.groups, 0)
