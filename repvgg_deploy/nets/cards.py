"""What a RepVGG is made of (`ArchSpec`), and the named architectures (`Card`, read from `models/*.toml`)."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files import data_folder

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


@dataclass(frozen=True)
class Published:
    """Figures that the field reports for an architecture: millions, 10⁹ multiply-adds at 224 px, percent."""

    train_params_m: float | None = None
    deploy_params_m: float | None = None
    train_gflops: float | None = None
    deploy_gflops: float | None = None
    top1: float | None = None
    top5: float | None = None


@dataclass(frozen=True)
class Card:
    """A named architecture, as one file of `models/` describes it."""

    name: str
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    stem: int
    groups: int
    grouped_layers: tuple[int, ...]
    se_ratio: int
    se_position: Literal["before", "after"]
    classes: int
    preprocessing: Preprocessing
    published: Published
    source: str

    def spec(self, classes: int | None = None, in_channels: int = 3) -> ArchSpec:
        """The training form of this architecture."""
        counts = (1, *self.blocks)
        widths = (self.stem, *self.widths)
        stages: list[tuple[BlockSpec, ...]] = []
        channels, layer = in_channels, 0
        for count, width in zip(counts, widths, strict=True):
            stage = []
            for index in range(count):
                groups = self.groups if layer in self.grouped_layers else 1
                block = BlockSpec(channels, width, 2 if index == 0 else 1, groups, (), False, self._se(width))
                stage.append(replace(block, branches=training_branches(block)))
                channels, layer = width, layer + 1
            stages.append(tuple(stage))
        return ArchSpec(tuple(stages), classes or self.classes)

    def _se(self, width: int) -> SqueezeExcite | None:
        return SqueezeExcite(width // self.se_ratio, self.se_position) if self.se_ratio else None

    def matches(self, spec: ArchSpec) -> bool:
        """Whether `spec` has this card's stages, widths, groups and squeeze-excites."""
        return self.spec().shape == spec.shape


def training_branches(block: BlockSpec) -> tuple[Branch, ...]:
    """The three branches of a RepVGG block; no identity where the shape changes (paper section 3.2)."""
    return tuple(b for b in TRAINING_BRANCHES if b.kernel != IDENTITY or block.can_skip)


@cache
def load_cards() -> dict[str, Card]:
    """All RepVGG cards of `models/`, by name, in the order of their training-form size."""
    tables = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(data_folder("models").glob("*.toml"))]
    cards = [_read_card(table) for table in tables if table["family"] == "repvgg"]
    cards.sort(key=lambda card: card.published.train_params_m or 0.0)
    return {card.name: card for card in cards}


def _read_card(values: dict[str, Any]) -> Card:
    arch, images = values["arch"], values["preprocessing"]
    multipliers = arch["width_multipliers"]
    widths = tuple(int(base * w) for base, w in zip((64, 128, 256, 512), multipliers, strict=True))
    return Card(
        name=values["name"],
        blocks=tuple(arch["blocks"]),
        widths=widths,
        stem=arch.get("stem", min(64, widths[0])),
        groups=arch.get("groups", 1),
        # Paper section 4.1: every second layer, counted from 1 at the first block after the stem, up to 26.
        grouped_layers=tuple(range(2, 27, 2)) if arch.get("groups", 1) > 1 else (),
        se_ratio=arch.get("se_ratio", 0),
        se_position=arch.get("se_position", "before"),
        classes=values.get("classes", 1000),
        preprocessing=Preprocessing(
            height=images["size"],
            width=images["size"],
            resize=images["resize"],
            mean=tuple(images["mean"]),
            std=tuple(images["std"]),
        ),
        published=Published(**values.get("published", {})),
        source=values["source"],
    )


def find_card(name: str) -> Card:
    """The card that a user means by `A0`, `RepVGG-A0`, `repvgg_a0`, in any case.

    Raises:
        DeployError: no card has that name; the hint lists those there are.
    """
    wanted = _plain(name)
    for card in load_cards().values():
        if _plain(card.name) == wanted:
            return card
    names = ", ".join(card.removeprefix("RepVGG-") for card in load_cards())
    raise DeployError(f"no architecture is called {name!r}", f"one of: {names}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("repvgg").removeprefix("plus")


def match_card(spec: ArchSpec) -> Card | None:
    """The card whose architecture `spec` is, or None for a custom one.

    Holocron gives every stage, the stem's too, one block more than its card says; those match as well.
    """
    shorter = replace(spec, stages=tuple(stage[:-1] for stage in spec.stages))
    candidates = [spec] + ([shorter] if all(shorter.stages) else [])
    for candidate in candidates:
        for card in load_cards().values():
            if card.matches(candidate):
                return card
    return None


def describe(spec: ArchSpec) -> str:
    """The name of the architecture: a card's name, or what a custom one consists of."""
    card = match_card(spec)
    if card is not None:
        extra = "" if card.matches(spec) else " (one block more in every stage)"
        return card.name + extra
    blocks = ",".join(str(len(stage)) for stage in spec.stages[1:])
    widths = ",".join(str(stage[-1].out_channels) for stage in spec.stages)
    return f"custom RepVGG (blocks {blocks}; widths {widths})"


def named_blocks(spec: ArchSpec) -> Iterator[tuple[str, BlockSpec]]:
    """Each block with its canonical name `stages.S.B`."""
    for s, stage in enumerate(spec.stages):
        for b, block in enumerate(stage):
            yield f"stages.{s}.{b}", block
