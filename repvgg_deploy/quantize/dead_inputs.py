"""Kernel columns whose input channel is dead: removed, because one outlier there sets the scale of a whole filter.

An identity branch behind a (nearly) dead channel has a tiny σ, so γ/σ puts an enormous weight on an input that is ≈ 0.
Source: "Make RepVGG Greater Again: A Quantization-Aware Approach", section 3 (https://arxiv.org/abs/2212.01593).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantize.edges import fused_blocks
from repvgg_deploy.quantize.statistics import CalibrationStatistics, EdgeStatistics


@dataclass(frozen=True)
class RemovedInputs:
    """What was removed from one layer: input channels, single filter columns, and the bound on what that can change.

    `bound` is the largest change of any output of the layer on the calibration images, in shares of that output's root
    mean square; it is proved from the channels' largest values, not measured.
    """

    channels: int
    columns: int
    bound: float


@torch.no_grad()
def remove_dead_inputs(net: RepVGG, statistics: CalibrationStatistics, share: float) -> dict[str, RemovedInputs]:
    """Set to zero the kernel columns of `net` that cannot matter on the calibration images; changes `net`.

    Column (o, i) of a kernel W adds at most max|xᵢ| · Σ over taps |W[o, i, tap]| to output o. Columns are removed
    from the smallest on, for as long as the sum of these bounds stays below `share` of the output's root mean square,
    and only where the column holds a weight larger than any kept one: small weights cost nothing. A channel that is
    always zero is removed whole.

    Returns:
        For each layer what was removed.
    """
    removed = {}
    for name, block in fused_blocks(net):
        removed[name] = _remove(block.conv, statistics.edges[name], share)
    return removed


def _remove(conv: nn.Conv2d, edge: EdgeStatistics, share: float) -> RemovedInputs:
    weight = conv.weight
    largest = _inputs_of_filters(torch.as_tensor(edge.largest, device=weight.device), conv)
    square = _inputs_of_filters(torch.as_tensor(edge.mean_square, device=weight.device), conv)
    size = weight.double().abs().flatten(2)
    bound = size.sum(2) * largest
    # Inputs are taken as independent here: what counts is the order of magnitude of the output.
    strength = ((size**2).sum(2) * square).sum(1).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    relative = bound / strength[:, None]
    order = relative.argsort(1)
    total = relative.gather(1, order).cumsum(1)
    small = torch.zeros_like(relative, dtype=torch.bool).scatter_(1, order, total <= share)
    peak = size.amax(2)
    needed = torch.where(small, torch.zeros_like(peak), peak).amax(1, keepdim=True)
    gone = (small & (peak > needed)) | ((largest == 0) & (peak > 0))
    weight.masked_fill_(gone[:, :, None, None], 0.0)
    channels = int(((largest == 0).all(0) & gone.any(0)).sum()) if conv.groups == 1 else int((edge.largest == 0).sum())
    change = torch.where(gone, relative, torch.zeros_like(relative)).sum(1).max()
    return RemovedInputs(channels, int(gone.sum()), float(change))


def _inputs_of_filters(values: Tensor, conv: nn.Conv2d) -> Tensor:
    """Per-channel values (C) as (filters, C / groups): what each column of each filter reads."""
    grouped = values.reshape(conv.groups, -1)
    return grouped.repeat_interleave(conv.out_channels // conv.groups, 0)
