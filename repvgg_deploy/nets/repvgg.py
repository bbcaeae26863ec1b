"""RepVGG as torch modules: the canonical training block, the fused block, and the net made of either.

Source: "RepVGG: Making VGG-style ConvNets Great Again", section 3 (https://arxiv.org/abs/2101.03697).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from repvgg_deploy.nets.activations import RELU, Activation
from repvgg_deploy.nets.spec import IDENTITY, ArchSpec, BlockSpec, Branch, SqueezeExcite, branch_name


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


def make_activation(activation: Activation) -> nn.Module:
    """The torch module of an activation."""
    modules: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "silu": nn.SiLU,
        "hardswish": nn.Hardswish,
        "gelu": nn.GELU,
        "elu": nn.ELU,
        "mish": nn.Mish,
    }
    if activation.name == "leaky_relu":
        return nn.LeakyReLU(activation.slope)
    return modules[activation.name]()


class TrainingBlock(nn.Module):
    """A RepVGG block as it is trained: act(SE(BN(Σ branches))), BN and SE where the spec has them."""

    def __init__(self, spec: BlockSpec, eps: float = 1e-5, activation: Activation = RELU) -> None:
        super().__init__()
        self.spec = spec
        for branch in spec.branches:
            self.add_module(branch_name(branch.kernel), ConvBranch(spec, branch, eps))
        self.bn = nn.BatchNorm2d(spec.out_channels, eps=eps) if spec.norm_after_sum else None
        self.se_before = _squeeze_excite(spec, "before")
        self.act = make_activation(activation)
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
    """A block as it is deployed: one convolution with a bias, the activation, and the SE that the block had.

    `se_before`, `act` and `se_after` are the modules of the block that was fused, whatever they are.
    """

    def __init__(self, conv: nn.Conv2d, se_before: nn.Module, act: nn.Module, se_after: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.se_before = se_before
        self.act = act
        self.se_after = se_after

    @classmethod
    def from_spec(cls, spec: BlockSpec, activation: Activation = RELU) -> FusedBlock:
        """An uninitialized deploy-form block."""
        conv = nn.Conv2d(spec.in_channels, spec.out_channels, 3, spec.stride, 1, groups=spec.groups)
        act = make_activation(activation)
        return cls(conv, _squeeze_excite(spec, "before"), act, _squeeze_excite(spec, "after"))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.se_after(self.act(self.se_before(self.conv(x)))))


def _squeeze_excite(spec: BlockSpec, position: str) -> nn.Module:
    se: SqueezeExcite | None = spec.squeeze_excite
    if se is None or se.position != position:
        return nn.Identity()
    return SqueezeExciteBlock(spec.out_channels, se.channels)


class RepVGG(nn.Module):
    """A RepVGG of any form: blocks by stage, global average pool, linear classifier.

    Input (N, in_channels, H, W), output logits (N, classes), or of a backbone the pooled features (N, C). `spec` says
    what it consists of; a block without branches is a `FusedBlock`, the others are `TrainingBlock`s. Only a net with
    classes has a `classifier`.
    """

    classifier: nn.Linear

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stages = nn.ModuleList(
            nn.Sequential(*(_make_block(block, spec) for block in stage)) for stage in spec.stages
        )
        widths = (spec.features, *spec.hidden)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        if spec.classes:
            self.classifier = nn.Linear(widths[-1], spec.classes)

    @property
    def has_classifier(self) -> bool:
        """Whether this is a classifier and not a backbone."""
        return self.spec.classes > 0

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return next(self.parameters()).device

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks in the order of execution."""
        for stage in self.stages:
            yield from cast(nn.Sequential, stage)

    def named_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """The blocks in the order of execution, each with its canonical name `stages.S.B`."""
        for s, stage in enumerate(self.stages):
            for b, block in enumerate(cast(nn.Sequential, stage)):
                yield f"stages.{s}.{b}", block

    @property
    def map_names(self) -> dict[str, str]:
        """The name of each output that is a stage's map, by the name of the block that makes it."""
        lengths = [len(stage) for stage in self.spec.stages]
        names = zip(self.spec.maps, self.spec.output_names, strict=False)
        return {f"stages.{number}.{lengths[number] - 1}": name for number, name in names}

    def head(self, x: Tensor) -> Tensor:
        """Logits (N, classes) or pooled features (N, C) of the last block's output (N, C, H, W)."""
        pooled = x.mean((2, 3))
        for linear in self.hidden:
            pooled = torch.relu(linear(pooled))
        return cast(Tensor, self.classifier(pooled)) if self.has_classifier else pooled

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks():
            x = block(x)
        return self.head(x)

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """All that the net gives, by the names of `ArchSpec.output_names`."""
        maps = self.map_names
        found: dict[str, Tensor] = {}
        for name, block in self.named_blocks():
            x = block(x)
            if name in maps:
                found[maps[name]] = x
        return found or {self.spec.output_names[0]: self.head(x)}


def _make_block(block: BlockSpec, net: ArchSpec) -> nn.Module:
    if block.is_fused:
        return FusedBlock.from_spec(block, net.activation)
    return TrainingBlock(block, net.bn_eps, net.activation)
