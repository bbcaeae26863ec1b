"""What a RepVGG consists of: branches, blocks, stages, activation and outputs; no tensor and no library is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

IDENTITY = 0
"""The `kernel` of an identity branch."""


@dataclass(frozen=True)
class Branch:
    """One summand of a block: a `kernel` x `kernel` convolution (0: the identity), with or without a BN."""

    kernel: int
    norm: bool = True


TRAINING_BRANCHES = (Branch(3), Branch(1), Branch(IDENTITY))


@dataclass(frozen=True)
class SqueezeExcite:
    """A squeeze-excite of `channels` hidden channels, `before` or `after` the block's ReLU."""

    channels: int
    position: Literal["before", "after"] = "before"


@dataclass(frozen=True)
class BlockSpec:
    """One block: Σ branches → optional BN → optional SE → ReLU → optional SE.

    A deploy-form block has no branches: it is one 3×3 convolution with a bias.
    """

    in_channels: int
    out_channels: int
    stride: int
    groups: int = 1
    branches: tuple[Branch, ...] = TRAINING_BRANCHES
    norm_after_sum: bool = False
    squeeze_excite: SqueezeExcite | None = None

    @property
    def is_fused(self) -> bool:
        """Whether the block is one convolution already."""
        return not self.branches

    @property
    def can_skip(self) -> bool:
        """Whether input and output have the same shape, so that an identity branch is possible."""
        return self.in_channels == self.out_channels and self.stride == 1

    def fused(self) -> BlockSpec:
        """The deploy form of this block."""
        return replace(self, branches=(), norm_after_sum=False)


@dataclass(frozen=True)
class ArchSpec:
    """A whole network: stages of blocks (stage 0 is the stem), global average pool, one linear layer."""

    stages: tuple[tuple[BlockSpec, ...], ...]
    classes: int
    bn_eps: float = 1e-5

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks in the order of execution."""
        return tuple(block for stage in self.stages for block in stage)

    @property
    def in_channels(self) -> int:
        """Channels of the input image."""
        return self.stages[0][0].in_channels

    @property
    def features(self) -> int:
        """Channels that reach the classifier."""
        return self.stages[-1][-1].out_channels

    @property
    def form(self) -> Literal["train", "deploy"]:
        """`deploy` where every block is one convolution, else `train`."""
        return "deploy" if all(block.is_fused for block in self.blocks) else "train"

    def fused(self) -> ArchSpec:
        """The deploy form of this network."""
        return replace(self, stages=tuple(tuple(b.fused() for b in stage) for stage in self.stages))

    @property
    def shape(self) -> Shape:
        """What names an architecture: everything but the form, the classes and the input channels."""
        return tuple(tuple((b.out_channels, b.groups, b.squeeze_excite) for b in stage) for stage in self.stages)


Shape = tuple[tuple[tuple[int, int, SqueezeExcite | None], ...], ...]


def training_branches(block: BlockSpec) -> tuple[Branch, ...]:
    """The three branches of a RepVGG block; no identity where the shape changes (paper section 3.2)."""
    return tuple(b for b in TRAINING_BRANCHES if b.kernel != IDENTITY or block.can_skip)


def named_blocks(spec: ArchSpec) -> Iterator[tuple[str, BlockSpec]]:
    """Each block with its canonical name `stages.S.B`."""
    for s, stage in enumerate(spec.stages):
        for b, block in enumerate(stage):
            yield f"stages.{s}.{b}", block
