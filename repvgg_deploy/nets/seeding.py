"""Nets with random weights from a fixed seed: to time an architecture without a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from repvgg_deploy.artifacts import Array
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.cpu import require_memory
from repvgg_deploy.nets.baselines import BaselineNet, build_baseline
from repvgg_deploy.nets.cards import BaselineCard, RepVGGCard
from repvgg_deploy.nets.repvgg import RepVGG

# At 64 px the last maps have 2x2 pixels: sixteen values for the statistics of each channel.
_SETTLING_BATCH, _SETTLING_SIZE = 4, 64


@torch.no_grad()
def seed_weights(net: nn.Module, in_channels: int, size: int | None = None, seed: int = 0) -> None:
    """Give `net` weights of the usual size, and BN statistics that are those of a batch of noise; evaluation mode.

    So activations neither vanish nor overflow, in FP16 as well: on a CPU numbers below the normal range, and on a GPU
    all-zero data, would be timed at another speed than a trained net's.

    Args:
        net: its BNs must not be folded yet.
        in_channels: of its input.
        size: of the noise images in pixels, for a net that takes only one size.
        seed: of everything that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # He's variance, as a ReLU halves the energy; after most linear layers there is none.
            gain = 2 if isinstance(module, nn.Conv2d) else 1
            module.weight.normal_(0, (gain / module.weight[0].numel()) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    for norm in norms:
        norm.weight.uniform_(0.5, 1.0, generator=generator)
        norm.bias.normal_(0, 0.1, generator=generator)
    if norms:
        side = size or _SETTLING_SIZE
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            # So the running statistics become those of this batch alone.
            norm.momentum = 1.0
        net.train()
        net(torch.randn(_SETTLING_BATCH, in_channels, side, side, generator=generator))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    net.requires_grad_(False).eval()


def seeded_repvgg(card: RepVGGCard, seed: int = 0) -> RepVGG:
    """The training form of a card with random weights."""
    net = RepVGG(card.spec())
    seed_weights(net, net.spec.in_channels, seed=seed)
    return net


def seeded_baseline(card: BaselineCard, seed: int = 0) -> BaselineNet:
    """A baseline with random weights, its BNs not folded."""
    net = build_baseline(card)
    seed_weights(net, net.spec.in_channels, seed=seed)
    return net


def seeded_inputs(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """Inputs in the range that normalized images have, or pixels where `dtype` is uint8; the same each time.

    Raises:
        DeployError: memory cannot hold them.
    """
    generator = np.random.default_rng(0)
    what = f"a batch of {'x'.join(map(str, shape))}"
    require_memory(math.prod(shape) * (1 if dtype == np.uint8 else 4), what)
    try:
        if dtype == np.uint8:
            return generator.integers(0, 256, shape, dtype=np.uint8)
        return generator.standard_normal(shape, dtype=np.float32).astype(dtype, copy=False)
    except MemoryError as error:
        raise DeployError(f"there is too little memory for {what}", "a smaller batch or size") from error
