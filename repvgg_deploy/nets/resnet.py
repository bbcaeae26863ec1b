"""ResNet v1.5, to compare with: the stride of a bottleneck is in its 3×3 convolution.

Source: "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385); v1.5 is what NVIDIA, MLPerf
and torchvision call ResNet. The tensors have torchvision's names, which timm's checkpoints use as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class ResNetSpec:
    """Blocks of the four stages, and whether they are bottlenecks (1×1, 3×3, 1×1 to four times the width)."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    classes: int = 1000
    in_channels: int = 3

    @property
    def expansion(self) -> int:
        """Output channels of a block over its width."""
        return 4 if self.bottleneck else 1


class ResidualBlock(nn.Module):
    """relu(last(… relu(first(x))) + skip(x)): two 3×3 convolutions, or a bottleneck of three.

    `kernels` are the sizes of the convolutions; the stride is in the first 3×3 one. After `fold_batch_norms` the BNs
    are identities.
    """

    def __init__(self, in_channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out_channels = 4 * width if bottleneck else width
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = (in_channels, width, width, out_channels) if bottleneck else (in_channels, width, out_channels)
        strided = kernels.index(3)
        self.depth = len(kernels)
        for index, kernel in enumerate(kernels):
            step = stride if index == strided else 1
            conv = nn.Conv2d(widths[index], widths[index + 1], kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{index + 1}", conv)
            self.add_module(f"bn{index + 1}", nn.BatchNorm2d(widths[index + 1]))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def conv(self, index: int) -> nn.Conv2d:
        """The convolution of that number, from 1."""
        return cast(nn.Conv2d, self.get_submodule(f"conv{index}"))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{index}")(self.conv(index)(y))
            if index < self.depth:
                y = self.relu(y)
        y += x if self.downsample is None else self.downsample(x)
        return cast(Tensor, self.relu(y))


class ResNet(nn.Module):
    """Stem 7×7 stride 2, max pool, four stages, global average pool, linear classifier.

    Input (N, in_channels, H, W), output logits (N, classes).
    """

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.conv1 = nn.Conv2d(spec.in_channels, 64, 7, 2, 3, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, (count, width) in enumerate(zip(spec.blocks, WIDTHS, strict=True), 1):
            blocks = []
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(ResidualBlock(channels, width, stride, spec.bottleneck))
                channels = width * spec.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, spec.classes)

    def named_blocks(self) -> Iterator[tuple[str, ResidualBlock]]:
        """The blocks in the order of execution, named `layerS.B`."""
        for stage in range(1, 5):
            for index, block in enumerate(cast(nn.Sequential, self.get_submodule(f"layer{stage}"))):
                yield f"layer{stage}.{index}", cast(ResidualBlock, block)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for _, block in self.named_blocks():
            x = block(x)
        return cast(Tensor, self.fc(x.mean((2, 3))))
