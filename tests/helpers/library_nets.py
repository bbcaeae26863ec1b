"""A small RepVGG as a library's own module, with its names: what a trainer trains and saves."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from helpers.small_nets import randomize

_ROLES = ("dense", "one", "identity", "bn", "stem", "stage")
OFFICIAL = dict(zip(_ROLES, ("rbr_dense", "rbr_1x1", "rbr_identity", "bn", "stage0", "stage"), strict=True))
OPENMMLAB = dict(zip(_ROLES, ("branch_3x3", "branch_1x1", "branch_norm", "norm", "stem", "stage_"), strict=True))


class Block(nn.Module):
    """relu(3×3 + 1×1 + identity), each with a BN."""

    def __init__(self, inputs: int, outputs: int, stride: int, names: Mapping[str, str]) -> None:
        super().__init__()
        self._names = [names["dense"], names["one"]]
        for name, kernel in zip(self._names, (3, 1), strict=True):
            branch = nn.Sequential()
            branch.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False))
            branch.add_module(names["bn"], nn.BatchNorm2d(outputs))
            self.add_module(name, branch)
        if inputs == outputs and stride == 1:
            self._names.append(names["identity"])
            self.add_module(names["identity"], nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum((self.get_submodule(name)(x) for name in self._names), torch.zeros(())))


class Backbone(nn.Module):
    """A stem and four stages; gives the last stage's pooled features."""

    def __init__(self, names: Mapping[str, str], widths: tuple[int, ...] = (8, 8, 12, 16, 24)) -> None:
        super().__init__()
        self.add_module(names["stem"], Block(3, widths[0], 2, names))
        self._order = [names["stem"]]
        for stage, (inputs, outputs) in enumerate(pairwise(widths), 1):
            name = f"{names['stage']}{stage}"
            self.add_module(name, nn.Sequential(Block(inputs, outputs, 2, names), Block(outputs, outputs, 1, names)))
            self._order.append(name)

    def forward(self, x: Tensor) -> Tensor:
        for name in self._order:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


class Official(Backbone):
    """The whole net with the names of the official code."""

    def __init__(self, classes: int = 5, seed: int = 0) -> None:
        super().__init__(OFFICIAL)
        self.linear = nn.Linear(24, classes)
        randomize(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(super().forward(x))
