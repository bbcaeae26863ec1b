"""VGG, to compare with: 3×3 convolutions, max pools, three linear layers, no BN.

Source: "Very Deep Convolutional Networks for Large-Scale Image Recognition" (https://arxiv.org/abs/1409.1556), column D
for VGG-16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)


@dataclass(frozen=True)
class VggSpec:
    """Convolutions of the five stages, and the width of the two hidden linear layers.

    The input's sides are `size` pixels, which the first linear layer depends on.
    """

    blocks: tuple[int, int, int, int, int]
    size: int = 224
    classes: int = 1000
    in_channels: int = 3
    hidden: int = 4096


class Vgg(nn.Module):
    """Input (N, in_channels, size, size), output logits (N, classes)."""

    def __init__(self, spec: VggSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = spec.in_channels
        stages = []
        for count, width in zip(spec.blocks, WIDTHS, strict=True):
            convs = nn.ModuleList()
            for _ in range(count):
                convs.append(nn.Conv2d(channels, width, 3, 1, 1))
                channels = width
            stages.append(convs)
        self.stages = nn.ModuleList(stages)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        side = spec.size // 32
        self.classifier = nn.ModuleList(
            [
                nn.Linear(channels * side * side, spec.hidden),
                nn.Linear(spec.hidden, spec.hidden),
                nn.Linear(spec.hidden, spec.classes),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for conv in cast(nn.ModuleList, stage):
                x = self.relu(conv(x))
            x = self.pool(x)
        x = x.flatten(1)
        for linear in list(self.classifier)[:-1]:
            x = self.relu(linear(x))
        return cast(Tensor, self.classifier[-1](x))
