"""Equalization along the chain: channels are rescaled between two layers so that one scale suits them all.

ReLU and leaky ReLU are positively homogeneous: f(x / r)·r = f(x) for r > 0. So the filter that makes a channel may be
divided by r and the columns that read it multiplied by r, and the net computes the same. A squeeze-excite between the
two reads the channel as well, and its columns get the same factor; its gate then is the same, and the product
homogeneous.
Source: "Data-Free Quantization Through Weight Equalization and Bias Correction" (https://arxiv.org/abs/1906.04721);
the exponent between activations and weights is that of SmoothQuant (https://arxiv.org/abs/2211.10438).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, SqueezeExciteBlock
from repvgg_deploy.quantization.points import CLASSIFIER, POOL, fused_blocks, per_channel
from repvgg_deploy.quantization.state import QuantizationState

_ROUNDS = 3
_LIMIT = 1e8


@torch.no_grad()
def equalize(state: QuantizationState) -> QuantizationState:
    """Rescale the channels of every point between two layers.

    Given: a `net` that computes what `statistics` were taken of, or nearly so. Gives: a `net` that computes the same
    with other ranges, and the `factors` (C) by which the activations of each point were divided; nothing new if the
    recipe's exponent `equalize` is None.

    Maps that the net gives are not rescaled; after an activation that is not homogeneous nothing is.

    The factor of a channel is r = a^exponent / w^(1 − exponent), a the largest activation that an image usually has, w
    the largest share that its columns have of a filter's largest weight; their geometric mean over the channels is 1.
    Per-channel weight scales make the rescaled filters free; what is traded is the activation's range against the
    readers' weights.
    """
    exponent = state.recipe.equalize
    if exponent is None:
        return state
    net, points = copy.deepcopy(state.net), state.statistics.points
    pairs = _pairs(net)
    largest = [torch.as_tensor(points[name].usual, device=net.device) for _, name, _ in pairs]
    found = equalize_pairs([(block, reader) for block, _, reader in pairs], largest, exponent)
    factors = {name: factor for (_, name, _), factor in zip(pairs, found, strict=True)}
    if POOL in factors:
        factors[CLASSIFIER] = factors[POOL]
    return replace(state, net=net, factors=factors)


@torch.no_grad()
def equalize_pairs(
    pairs: Sequence[tuple[FusedBlock, nn.Conv2d | nn.Linear]], largest: Sequence[Tensor], exponent: float
) -> list[Tensor]:
    """Rescale the channels between each block and the one layer that reads it; changes both. See `equalize`.

    `largest` are the activations (C) between the two that an image usually has; returned are the factors.
    """
    factors = [torch.ones_like(values) for values in largest]
    # Rescaling the columns of one layer changes the shares in the filters of the next: a few rounds settle it.
    for _ in range(_ROUNDS):
        for index, (block, reader) in enumerate(pairs):
            factor = _factors(largest[index] / factors[index], reader, exponent)
            # Held in float32, with which the weights are multiplied, so that the bookkeeping is that of the net.
            factors[index] = factors[index] * factor
            divide_channels(block, reader, factor)
    return factors


def _pairs(net: RepVGG) -> list[tuple[FusedBlock, str, nn.Conv2d | nn.Linear]]:
    """Where channels may be rescaled: the block in front, the point's name, and the layer that reads it."""
    if not net.spec.activation.is_homogeneous:
        return []
    blocks = fused_blocks(net)
    readers: list[tuple[str, nn.Conv2d | nn.Linear]] = [(name, block.conv) for name, block in blocks[1:]]
    if net.has_classifier:
        readers.append((POOL, net.classifier))
    # Of a backbone nothing reads the last block.
    pairs = zip(blocks, readers, strict=False)
    return [(block, point, reader) for (name, block), (point, reader) in pairs if name not in net.map_names]


def _factors(largest: Tensor, reader: nn.Conv2d | nn.Linear, exponent: float) -> Tensor:
    weight = reader.weight.double()
    peak = weight.abs().flatten(1).amax(1)
    share = (weight / per_channel(peak.clamp_min(1e-300), weight)).abs()
    if isinstance(reader, nn.Conv2d):
        # (filters, C / groups, taps): of each input channel the largest share over the filters of its group.
        share = share.flatten(2).amax(2).reshape(reader.groups, -1, weight.shape[1]).amax(1).flatten()
    else:
        share = share.amax(0)
    # What is always 0, or read by nobody, has no range to trade.
    alive = (largest > 0) & (share > 0)
    if not alive.any():
        return torch.ones_like(largest)
    logs = exponent * largest.clamp_min(1e-300).log() - (1 - exponent) * share.clamp_min(1e-300).log()
    # A factor that all channels share changes nothing but the scales. Without it the numbers stay of the order they
    # were.
    logs = logs - logs[alive].mean()
    factor = torch.where(alive, logs, torch.zeros_like(logs)).exp()
    return factor.clamp(1 / _LIMIT, _LIMIT)


def divide_channels(block: FusedBlock, reader: nn.Conv2d | nn.Linear, factor: Tensor) -> None:
    """Divide the outputs of `block` by `factor` (C), and multiply the columns of the layer that reads them by it."""
    conv = block.conv
    assert conv.bias is not None
    conv.weight.copy_(conv.weight.double() / per_channel(factor, conv.weight))
    conv.bias.copy_(conv.bias.double() / factor)
    for se in (block.se_before, block.se_after):
        if isinstance(se, SqueezeExciteBlock):
            se.down.weight.copy_(se.down.weight.double() * factor[None, :, None, None])
    weight = reader.weight
    if isinstance(reader, nn.Conv2d):
        columns = factor.reshape(reader.groups, -1).repeat_interleave(reader.out_channels // reader.groups, 0)
        weight.copy_(weight.double() * columns[:, :, None, None])
    else:
        weight.copy_(weight.double() * factor[None, :])
