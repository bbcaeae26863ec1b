"""Small whole networks around RepVGG blocks: segmentation, a detector with three outputs, an extractor of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.foreign_blocks import SumOfBranches


def repvgg_block(cin: int, cout: int, stride: int = 1, dilation: int = 1) -> SumOfBranches:
    """A block of three branches."""
    return SumOfBranches(cin, cout, (3,), stride, dilation)


class PyramidNet(nn.Module):
    """Segmentation as PSPNet does it: a RepVGG backbone, dilated at the end, pooled at several sizes, and upsampled."""

    def __init__(self, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(repvgg_block(3, width, 2), repvgg_block(width, width))
        # As in practice: no strides in the last stages, dilation in their place.
        self.body = nn.Sequential(
            repvgg_block(width, 2 * width, 2),
            repvgg_block(2 * width, 2 * width),
            repvgg_block(2 * width, 2 * width, dilation=2),
            repvgg_block(2 * width, 2 * width, dilation=4),
        )
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(2 * width, width // 2, 1), nn.ReLU())
            for size in (1, 2, 4)
        )
        self.head = nn.Conv2d(2 * width + 3 * (width // 2), classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(self.stem(images))
        sizes = [F.interpolate(pool(x), size=x.shape[2:], mode="bilinear", align_corners=False) for pool in self.pools]
        scores = self.head(torch.cat([x, *sizes], 1))
        return F.interpolate(scores, size=images.shape[2:], mode="bilinear", align_corners=False)


class ThreeHeads(nn.Module):
    """As a detector: features of three sizes, mixed upwards, one block shared by all sizes, three outputs."""

    def __init__(self, width: int = 16, outputs: int = 9) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(repvgg_block(cin, width, stride), repvgg_block(width, width))
            for cin, stride in ((3, 4), (width, 2), (width, 2))
        )
        self.stages[0][0] = nn.Sequential(repvgg_block(3, width, 2), repvgg_block(width, width, 2))
        self.shared = repvgg_block(width, width)
        self.heads = nn.ModuleList(nn.Conv2d(width, outputs, 1) for _ in range(3))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, found = images, []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        outputs, above = {}, None
        for level in (2, 1, 0):
            mixed = found[level] if above is None else found[level] + F.interpolate(above, scale_factor=2.0)
            above = self.shared(mixed)
            outputs[f"level{level}"] = self.heads[level](above)
        return outputs


class Extractor(nn.Module):
    """Gives the features of every stage, as timm's `features_only` does."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stages = nn.ModuleList(repvgg_block(cin, width, 2) for cin in (3, width, width))

    def forward(self, images: Tensor) -> list[Tensor]:
        found = [images]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found[1:]
