"""What a RepVGG consists of: branches, blocks, stages, activation and outputs; no tensor and no library is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.activations import RELU, Activation

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
    """A squeeze-excite of `channels` hidden channels, `before` or `after` the block's activation."""

    channels: int
    position: Literal["before", "after"] = "before"


@dataclass(frozen=True)
class BlockSpec:
    """One block: Σ branches → optional BN → optional SE → activation → optional SE.

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
    """A whole network: stages of blocks (stage 0 is the stem), global average pool, one linear layer.

    Attributes:
        stages: blocks by stage, in the order of execution.
        classes: outputs of the linear layer; 0 for a backbone, which has none.
        bn_eps: the ε of all BNs.
        activation: of all blocks.
        maps: the stages whose outputs the net gives instead of pooled features; only a backbone has some.
        hidden: widths of the linear layers, each with a ReLU after it, between the pool and the last one.
    """

    stages: tuple[tuple[BlockSpec, ...], ...]
    classes: int
    bn_eps: float = 1e-5
    activation: Activation = RELU
    maps: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()

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
    def strides(self) -> tuple[int, ...]:
        """The stride of each stage, which its first block has."""
        return tuple(stage[0].stride for stage in self.stages)

    @property
    def output_names(self) -> tuple[str, ...]:
        """What the net gives: `logits`, `features`, or maps as `stage2`, `stage3`."""
        if self.maps:
            return tuple(f"stage{number}" for number in self.maps)
        return ("logits",) if self.classes else ("features",)

    @property
    def form(self) -> Literal["train", "deploy"]:
        """`deploy` where every block is one convolution, else `train`."""
        return "deploy" if all(block.is_fused for block in self.blocks) else "train"

    def fused(self) -> ArchSpec:
        """The deploy form of this network."""
        return replace(self, stages=tuple(tuple(b.fused() for b in stage) for stage in self.stages))

    def with_strides(self, strides: tuple[int, ...]) -> ArchSpec:
        """This network with other strides of its stages' first blocks.

        Raises:
            DeployError: there is not one for each stage, or a block with an identity branch would not have stride 1.
        """
        if len(strides) != len(self.stages) or min(strides) < 1:
            raise DeployError(
                f"{len(strides)} strides for {len(self.stages)} stages",
                f"one for the stem and one for each stage: --strides {','.join(map(str, self.strides))}",
            )
        # A bare identity leaves no tensor: it is there wherever it is possible.
        bare = Branch(IDENTITY, norm=False)
        has_bare = any(bare in block.branches for block in self.blocks)
        stages = []
        for number, (stage, stride) in enumerate(zip(self.stages, strides, strict=True)):
            first = replace(stage[0], stride=stride)
            if has_bare:
                kept = tuple(branch for branch in first.branches if branch != bare)
                first = replace(first, branches=(*kept, bare) if first.can_skip else kept)
            elif any(branch.kernel == IDENTITY for branch in first.branches) and stride != 1:
                raise DeployError(
                    f"the first block of stage {number} has an identity branch, so its stride is 1, not {stride}",
                    "give the strides that the net was trained with",
                )
            stages.append((first, *stage[1:]))
        return replace(self, stages=tuple(stages))

    def backbone(self, maps: tuple[int, ...] = ()) -> ArchSpec:
        """This network without its linear layer; with `maps` it ends after the last of these stages, which it gives.

        Raises:
            DeployError: there is no such stage.
        """
        chosen = tuple(sorted(set(maps)))
        if chosen and not 0 <= chosen[0] <= chosen[-1] < len(self.stages):
            raise DeployError(
                f"there is no stage {chosen[-1] if chosen[0] >= 0 else chosen[0]}",
                f"the stem is stage 0, the last one is stage {len(self.stages) - 1}",
            )
        stages = self.stages[: chosen[-1] + 1] if chosen else self.stages
        return replace(self, stages=stages, classes=0, maps=chosen, hidden=())

    @property
    def shape(self) -> Shape:
        """What names an architecture: everything but the form, the classes and the input channels."""
        return tuple(tuple((b.out_channels, b.groups, b.squeeze_excite) for b in stage) for stage in self.stages)


Shape = tuple[tuple[tuple[int, int, SqueezeExcite | None], ...], ...]


def training_branches(block: BlockSpec) -> tuple[Branch, ...]:
    """The three branches of a RepVGG block; no identity where the shape changes (paper section 3.2)."""
    return tuple(b for b in TRAINING_BRANCHES if b.kernel != IDENTITY or block.can_skip)


def branch_name(kernel: int) -> str:
    """What a branch is called: `branch_3x3`, `branch_1x1` or `branch_identity`."""
    return "branch_identity" if kernel == IDENTITY else f"branch_{kernel}x{kernel}"


def tensor_shapes(spec: ArchSpec) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the blocks by canonical name, as `RepVGG(spec)` has it; no counters of BNs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, block in named_blocks(spec):
        width, per_group = block.out_channels, block.in_channels // block.groups
        if block.is_fused:
            shapes |= {f"{name}.conv.weight": (width, per_group, 3, 3), f"{name}.conv.bias": (width,)}
        for branch in block.branches:
            part = f"{name}.{branch_name(branch.kernel)}"
            if branch.kernel != IDENTITY:
                shapes[f"{part}.conv.weight"] = (width, per_group, branch.kernel, branch.kernel)
            shapes |= _norm_shapes(f"{part}.bn", width) if branch.norm else {}
        shapes |= _norm_shapes(f"{name}.bn", width) if block.norm_after_sum else {}
        if block.squeeze_excite is not None:
            part, hidden = f"{name}.se_{block.squeeze_excite.position}", block.squeeze_excite.channels
            shapes |= {f"{part}.down.weight": (hidden, width, 1, 1), f"{part}.down.bias": (hidden,)}
            shapes |= {f"{part}.up.weight": (width, hidden, 1, 1), f"{part}.up.bias": (width,)}
    return shapes


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}


def named_blocks(spec: ArchSpec) -> Iterator[tuple[str, BlockSpec]]:
    """Each block with its canonical name `stages.S.B`."""
    for s, stage in enumerate(spec.stages):
        for b, block in enumerate(stage):
            yield f"stages.{s}.{b}", block
