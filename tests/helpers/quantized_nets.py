"""Small fused nets and drawn images for the tests of quantization."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.small_nets import make_net
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.spec import SqueezeExcite
from repvgg_deploy.quantization import Recipe
from repvgg_deploy.quantization.points import fused_blocks
from repvgg_deploy.quantization.recipe import RoundingOptions

SHAPES = {
    "plain": {},
    "grouped": {"groups": 2},
    "se before": {"squeeze_excite": SqueezeExcite(4, "before")},
    "se after": {"squeeze_excite": SqueezeExcite(4, "after")},
}


def fused_net(shape: str = "plain", seed: int = 0) -> RepVGG:
    net = fuse(make_net(seed, **SHAPES[shape]))
    assert isinstance(net, RepVGG)
    return net.requires_grad_(False)


def draw_images(count: int = 40, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def in_batches(images: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(images.split(size))


def kill_channel(net: RepVGG, block: int, channel: int, outlier: float) -> None:
    """Make a channel dead, and give the next layer a huge weight on it, as γ/σ of a dead identity does."""
    blocks = fused_blocks(net)
    with torch.no_grad():
        blocks[block][1].conv.weight[channel] = 0
        blocks[block][1].conv.bias[channel] = -1
        blocks[block + 1][1].conv.weight[channel, channel, 1, 1] = outlier


QUICK_RECIPE = Path(__file__).with_name("quick.toml")
"""A recipe for commands: the methods of `fast` on fewer images and samples."""
QUICK = Recipe("quick", rounding=RoundingOptions(images=40, samples=2048))
