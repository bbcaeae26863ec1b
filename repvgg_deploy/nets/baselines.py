"""The nets to compare with: built from their cards, and with their BNs folded."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from repvgg_deploy.nets.cards import BaselineCard
from repvgg_deploy.nets.resnet import ResidualBlock, ResNet, ResNetSpec
from repvgg_deploy.nets.vgg import Vgg, VggSpec

BaselineNet = ResNet | Vgg


def build_baseline(card: BaselineCard) -> BaselineNet:
    """The net of a card, with the weights that torch happens to give it."""
    if card.family == "vgg":
        return Vgg(VggSpec(cast(tuple[int, int, int, int, int], card.blocks), card.preprocessing.height, card.classes))
    return ResNet(ResNetSpec(cast(tuple[int, int, int, int], card.blocks), card.bottleneck, card.classes))


@torch.no_grad()
def fold_batch_norms(net: BaselineNet) -> BaselineNet:
    """A copy of `net` in which every BN is part of the convolution before it, computed in float64.

    It is what every deployment of a ResNet does, and what fusing is to a RepVGG: so both are compared at their best.
    """
    folded = copy.deepcopy(net)
    if not isinstance(folded, ResNet):
        return folded
    _fold(folded, "conv1", "bn1")
    for _, block in folded.named_blocks():
        for index in range(1, block.depth + 1):
            _fold(block, f"conv{index}", f"bn{index}")
        if block.downsample is not None:
            _fold(block.downsample, "0", "1")
    return folded


def _fold(parent: ResNet | ResidualBlock | nn.Sequential, conv_name: str, bn_name: str) -> None:
    bn = parent.get_submodule(bn_name)
    if not isinstance(bn, nn.BatchNorm2d):
        return
    conv = cast(nn.Conv2d, parent.get_submodule(conv_name))
    mean, var = cast(torch.Tensor, bn.running_mean).double(), cast(torch.Tensor, bn.running_var).double()
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(), None, mean, var, bn.eps, bn.weight.double(), bn.bias.double()
    )
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    parent.add_module(bn_name, nn.Identity())
