"""The nets to compare with: cards of `models/` of the families `resnet` and `vgg`, built with random weights."""

from __future__ import annotations

import copy
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files import data_folder
from repvgg_deploy.nets.resnet import ResidualBlock, ResNet, ResNetSpec
from repvgg_deploy.nets.vgg import Vgg, VggSpec

BaselineNet = ResNet | Vgg


@dataclass(frozen=True)
class Baseline:
    """A net to compare with; the published figures are millions, 10⁹ multiply-adds at 224 px, and percent."""

    name: str
    spec: ResNetSpec | VggSpec
    preprocessing: Preprocessing
    params_m: float
    gflops: float
    top1: float
    source: str

    def build(self) -> BaselineNet:
        """The net, with the weights that torch happens to give it."""
        return ResNet(self.spec) if isinstance(self.spec, ResNetSpec) else Vgg(self.spec)


@cache
def load_baselines() -> dict[str, Baseline]:
    """All cards of nets other than RepVGGs, by name, in the order of their FLOPs."""
    tables = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(data_folder("models").glob("*.toml"))]
    found = [_read(table) for table in tables if table["family"] in ("resnet", "vgg")]
    found.sort(key=lambda baseline: baseline.gflops)
    return {baseline.name: baseline for baseline in found}


def _read(values: dict[str, Any]) -> Baseline:
    arch, images, published = values["arch"], values["preprocessing"], values["published"]
    blocks = tuple(arch["blocks"])
    spec = VggSpec(blocks, images["size"]) if values["family"] == "vgg" else ResNetSpec(blocks, arch["bottleneck"])
    preprocessing = Preprocessing(
        images["size"], images["size"], images["resize"], tuple(images["mean"]), tuple(images["std"])
    )
    params_m, gflops, top1 = (float(published[key]) for key in ("params_m", "gflops", "top1"))
    return Baseline(values["name"], spec, preprocessing, params_m, gflops, top1, values["source"])


def find_baseline(name: str) -> Baseline | None:
    """The card that a user means by `resnet50` or `ResNet-50`; None if there is none of that name."""
    wanted = _plain(name)
    return next((card for card in load_baselines().values() if _plain(card.name) == wanted), None)


def require_baseline(name: str) -> Baseline:
    """As `find_baseline`.

    Raises:
        DeployError: no card has that name; the hint lists those there are.
    """
    card = find_baseline(name)
    if card is None:
        names = ", ".join(_plain(known) for known in load_baselines())
        raise DeployError(f"no baseline is called {name!r}", f"one of: {names}")
    return card


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


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
