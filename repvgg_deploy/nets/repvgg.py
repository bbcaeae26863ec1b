"""RepVGG as torch modules: the canonical training block, the fused block, and the net made of either.

Source: "RepVGG: Making VGG-style ConvNets Great Again", section 3 (https://arxiv.org/abs/2101.03697).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from repvgg_deploy.nets.spec import IDENTITY, ArchSpec, BlockSpec, Branch, SqueezeExcite


class SqueezeExciteBlock(nn.Module):
    """Scales each channel by sigmoid(up(relu(down(mean over H and W)))); input and output (N, C, H, W)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = torch.relu(self.down(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.up(squeezed))


class ConvBranch(nn.Module):
    """One branch of a training block: a convolution or the identity, then a BN where the branch has one."""

    def __init__(self, block: BlockSpec, branch: Branch, eps: float) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Identity()
        if branch.kernel != IDENTITY:
            self.conv = nn.Conv2d(
                block.in_channels,
                block.out_channels,
                branch.kernel,
                stride=block.stride,
                padding=branch.kernel // 2,
                groups=block.groups,
                bias=False,
            )
        self.bn: nn.Module = nn.BatchNorm2d(block.out_channels, eps=eps) if branch.norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.bn(self.conv(x)))


def branch_name(kernel: int) -> str:
    """The attribute that holds a branch: `branch_3x3`, `branch_1x1` or `branch_identity`."""
    return "branch_identity" if kernel == IDENTITY else f"branch_{kernel}x{kernel}"


class TrainingBlock(nn.Module):
    """A RepVGG block as it is trained: relu(SE(BN(Σ branches))), BN and SE where the spec has them."""

    def __init__(self, spec: BlockSpec, eps: float = 1e-5) -> None:
        super().__init__()
        self.spec = spec
        for branch in spec.branches:
            self.add_module(branch_name(branch.kernel), ConvBranch(spec, branch, eps))
        self.bn = nn.BatchNorm2d(spec.out_channels, eps=eps) if spec.norm_after_sum else None
        self.se_before = _squeeze_excite(spec, "before")
        self.act = nn.ReLU()
        self.se_after = _squeeze_excite(spec, "after")

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.get_submodule(branch_name(branch.kernel)) for branch in self.spec.branches]
        total = branches[0](x)
        for branch in branches[1:]:
            total = total + branch(x)
        if self.bn is not None:
            total = self.bn(total)
        return cast(Tensor, self.se_after(self.act(self.se_before(total))))


class FusedBlock(nn.Module):
    """A block as it is deployed: one convolution with a bias, the ReLU, and the SE that the block had.

    `se_before`, `act` and `se_after` are the modules of the block that was fused, whatever they are.
    """

    def __init__(self, conv: nn.Conv2d, se_before: nn.Module, act: nn.Module, se_after: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.se_before = se_before
        self.act = act
        self.se_after = se_after

    @classmethod
    def from_spec(cls, spec: BlockSpec) -> FusedBlock:
        """An uninitialized deploy-form block."""
        conv = nn.Conv2d(spec.in_channels, spec.out_channels, 3, spec.stride, 1, groups=spec.groups)
        return cls(conv, _squeeze_excite(spec, "before"), nn.ReLU(), _squeeze_excite(spec, "after"))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.se_after(self.act(self.se_before(self.conv(x)))))


def _squeeze_excite(spec: BlockSpec, position: str) -> nn.Module:
    se: SqueezeExcite | None = spec.squeeze_excite
    if se is None or se.position != position:
        return nn.Identity()
    return SqueezeExciteBlock(spec.out_channels, se.channels)


class RepVGG(nn.Module):
    """A RepVGG of any form: blocks by stage, global average pool, linear classifier.

    Input (N, in_channels, H, W), output logits (N, classes); with 0 classes the pooled features (N, C). `spec` says
    what it consists of; a block without branches is a `FusedBlock`, the others are `TrainingBlock`s.
    """

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stages = nn.ModuleList(
            nn.Sequential(*(_make_block(block, spec.bn_eps) for block in stage)) for stage in spec.stages
        )
        # Without a classifier the pooled features are the output.
        has_classes = spec.classes > 0
        self.classifier = nn.Linear(spec.features, spec.classes) if has_classes else cast(nn.Linear, nn.Identity())

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks in the order of execution."""
        for stage in self.stages:
            yield from cast(nn.Sequential, stage)

    def named_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """The blocks in the order of execution, each with its canonical name `stages.S.B`."""
        for s, stage in enumerate(self.stages):
            for b, block in enumerate(cast(nn.Sequential, stage)):
                yield f"stages.{s}.{b}", block

    def head(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of the last block's output (N, C, H, W)."""
        return cast(Tensor, self.classifier(x.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks():
            x = block(x)
        return self.head(x)


def _make_block(spec: BlockSpec, eps: float) -> nn.Module:
    return FusedBlock.from_spec(spec) if spec.is_fused else TrainingBlock(spec, eps)
