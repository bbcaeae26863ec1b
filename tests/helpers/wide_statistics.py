"""Nets with random statistics over wide ranges, for the algebra of fusing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from repvgg_deploy.nets.cards import find_card


def randomize(module: nn.Module, seed: int = 0, low: float = 0.3, high: float = 3.0) -> nn.Module:
    """Statistics and weights as after a training: nothing is at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.Conv2d):
            # Large enough that a picture's signal, and not the biases, decides what comes out at the end.
            nn.init.normal_(norm.weight, 0, (2 / norm.weight[0].numel()) ** 0.5, generator)
        elif isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn(norm.num_features, generator=generator) * 0.3
            norm.running_var = torch.rand(norm.num_features, generator=generator) * (high - low) + low
            norm.weight.data = torch.rand(norm.num_features, generator=generator) * 0.9 + 0.3
            norm.bias.data = torch.randn(norm.num_features, generator=generator) * 0.2
    return module.eval()


def relative(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (candidate.detach().double() - reference.detach().double()).norm()
    # An output that the ReLU made all zero has no relative error.
    return float(difference / reference.detach().double().norm().clamp_min(1e-3))


def narrow(name: str, divisor: int = 8):
    """A card with its widths divided, blocks and groups as they are; SE wants at least 16 channels."""
    card = find_card(name)
    divisor = min(divisor, 4) if card.se_ratio == 16 else divisor
    return replace(card, stem=card.stem // divisor, widths=tuple(width // divisor for width in card.widths))
