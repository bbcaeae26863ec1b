"""Faults planted into fused nets without groups and squeeze-excites, by name: `CASES`.

The planted nets compute what the net computed up to rounding, with `HEAVY` tails nearly: a case is to measure
quantization and not another net. `DAMAGED` is another net, and not among the `USUAL_CASES`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG
from repvgg_deploy.quantization.layer_inputs import Moments, Streams, input_moments
from repvgg_deploy.quantization.points import BATCH, fused_blocks
from repvgg_deploy.quantization.target import is_plain

Floats = NDArray[np.float32]
Plant = Callable[[RepVGG, Floats], RepVGG]
"""Makes the planted net of a fused one; the images are those that the net is to do the same with."""

SPARE = 4
"""Channels that are planted beside those of a block."""

SAMPLES = 32768
"""Pixels of each layer's input that the other weights are fitted on, to make up for heavy tails."""


def _blocks(net: RepVGG) -> list[FusedBlock]:
    blocks = [block for _, block in fused_blocks(net)]
    if not all(is_plain(block) and block.conv.groups == 1 for block in blocks):
        raise ValueError("faults are planted into nets without groups and squeeze-excites only")
    return blocks


@torch.no_grad()
def _widen(net: RepVGG) -> RepVGG:
    """The net with `SPARE` more channels at the end of each edge between blocks; they are 0, and nothing reads them."""
    count = len(net.spec.blocks)
    blocks = iter(
        replace(
            block,
            in_channels=block.in_channels + (SPARE if index else 0),
            out_channels=block.out_channels + (SPARE if index < count - 1 else 0),
        )
        for index, block in enumerate(net.spec.blocks)
    )
    wide = RepVGG(replace(net.spec, stages=tuple(tuple(next(blocks) for _ in stage) for stage in net.spec.stages)))
    for source, target in zip(_blocks(net), _blocks(wide), strict=True):
        filters, columns = source.conv.weight.shape[:2]
        target.conv.weight.zero_()
        target.conv.weight[:filters, :columns] = source.conv.weight
        _bias_of(target).zero_()
        _bias_of(target)[:filters] = _bias_of(source)
    wide.classifier.load_state_dict(net.classifier.state_dict())
    return wide.eval().requires_grad_(False)


def _spare_channels(net: RepVGG, wide: RepVGG) -> Iterator[tuple[FusedBlock, FusedBlock, int, int]]:
    """Neighbours in the widened net of which the second could have an identity, a spare channel, its reading filter."""
    for (first, second), block in zip(pairwise(_blocks(wide)), net.spec.blocks[1:], strict=True):
        if block.can_skip:
            for index in range(SPARE):
                yield first, second, block.in_channels + index, index * block.out_channels // SPARE


def _bias_of(block: FusedBlock) -> Tensor:
    assert block.conv.bias is not None
    return block.conv.bias


@torch.no_grad()
def plant_constant(net: RepVGG, value: float, factor: float) -> RepVGG:
    """Channels that are always `value`, read with a γ/σ of `factor`; the bias takes back what they bring."""
    wide = _widen(net)
    for first, second, spare, reader in _spare_channels(net, wide):
        _bias_of(first)[spare] = value if value else -1.0
        second.conv.weight[reader, spare, 1, 1] = factor
        _bias_of(second)[reader] -= factor * value
    return wide


@torch.no_grad()
def plant_nearly_dead(net: RepVGG, factor: float, share: float = 1e-5) -> RepVGG:
    """Channels that are a `share` of another one, read with a γ/σ of `factor`; the other's column takes it back."""
    wide = _widen(net)
    for first, second, spare, reader in _spare_channels(net, wide):
        first.conv.weight[spare] = first.conv.weight[reader] * share
        _bias_of(first)[spare] = _bias_of(first)[reader] * share
        second.conv.weight[reader, spare, 1, 1] = factor
        second.conv.weight[reader, reader, 1, 1] -= factor * share
    return wide


@torch.no_grad()
def plant_strong_channel(net: RepVGG, factor: float) -> RepVGG:
    """One channel of each block `factor` times what it was, and the columns that read it divided by as much."""
    net = copy.deepcopy(net)
    for first, second in pairwise(_blocks(net)):
        first.conv.weight[0] *= factor
        _bias_of(first)[0] *= factor
        second.conv.weight[:, 0] /= factor
    return net


@torch.no_grad()
def plant_heavy_tails(net: RepVGG, images: Floats, share: float, factor: float) -> RepVGG:
    """A random `share` of all weights times `factor`; the other weights of each filter keep its output what it was."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.from_numpy(images)
    streams = Streams(pixels, pixels)
    for index, block in enumerate(_blocks(net)):
        original = copy.deepcopy(block)
        chosen = torch.rand(block.conv.weight.shape, generator=generator) < share
        (moments,) = input_moments(streams, block.conv, SAMPLES, index)
        rows = _hold_fixed(block.conv.weight.flatten(1), chosen.flatten(1), factor, moments)
        _bias_of(block).add_(block.conv.weight.flatten(1) @ moments.exact_mean - rows @ moments.rounded_mean)
        block.conv.weight.copy_(rows.reshape(block.conv.weight.shape))
        streams = Streams(_run(original, streams.exact), _run(block, streams.rounded))
    return net


def _hold_fixed(weight: Tensor, chosen: Tensor, factor: float, moments: Moments) -> Tensor:
    """The rows nearest in output to `weight` of which the `chosen` weights are held at `factor` times what they were.

    Source of the closed form: Optimal Brain Surgeon (Hassibi and Stork, 1992), with a value in place of zero.
    """
    damping = len(moments.covariance) / moments.samples * moments.covariance.diagonal().mean()
    inverse = torch.linalg.inv((moments.covariance + damping * torch.eye(len(moments.covariance))).double())
    # What the layers in front have changed is made up for first.
    rows: Tensor = weight.double() + moments.drift.double() @ inverse
    for row, wanted, held in zip(rows, weight.double() * factor, chosen, strict=True):
        columns = held.nonzero().flatten()
        change = (wanted - row)[columns]
        row += change @ torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
    return rows.to(weight.dtype)


def _run(block: FusedBlock, images: Tensor) -> Tensor:
    return torch.cat([cast(Tensor, block(part)) for part in torch.split(images, BATCH)])


@torch.no_grad()
def plant_damage(net: RepVGG, share: float, factor: float) -> RepVGG:
    """A random `share` of all weights times `factor`, and nothing that makes up for it."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    for block in _blocks(net):
        chosen = torch.rand(block.conv.weight.shape, generator=generator) < share
        block.conv.weight[chosen] *= factor
    return net


HEAVY = "heavy tails: 0.05 % of the weights x 10"
DAMAGED = "0.05 % of the weights x 4, nothing made up for"

CASES: dict[str, Plant] = {
    "as it was": lambda net, _: net,
    "dead channels, γ/σ 316 (σ² = 0)": lambda net, _: plant_constant(net, 0.0, 316.0),
    "dead channels, γ/σ 1500": lambda net, _: plant_constant(net, 0.0, 1500.0),
    "constant channels (σ² = 0), γ/σ 316": lambda net, _: plant_constant(net, 0.5, 316.0),
    "nearly dead channels, γ/σ 1500": lambda net, _: plant_nearly_dead(net, 1500.0),
    "one channel 1000 x": lambda net, _: plant_strong_channel(net, 1000.0),
    HEAVY: lambda net, images: plant_heavy_tails(net, images, 0.0005, 10.0),
    DAMAGED: lambda net, _: plant_damage(net, 0.0005, 4.0),
}
USUAL_CASES = [case for case in CASES if case != DAMAGED]
