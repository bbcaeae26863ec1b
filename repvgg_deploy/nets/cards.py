"""The named architectures: RepVGGs, and the nets to compare them with, each a `Card` read from `models/*.toml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from repvgg_deploy.artifacts import Preprocessing, Provenance
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.files.typed_values import Line, convert, parse_toml, read_file
from repvgg_deploy.nets.spec import ArchSpec, BlockSpec, SqueezeExcite, training_branches

_Count = Annotated[int, Meta(ge=1, le=1000)]
_Channels = Annotated[int, Meta(ge=1, le=1 << 16)]
_Classes = Annotated[int, Meta(ge=1, le=1 << 24)]
_Pixels = Annotated[int, Meta(ge=32, le=8192)]
_Multiplier = Annotated[float, Meta(gt=0, le=64)]
_Figure = Annotated[float, Meta(ge=0, le=1e6)]
_Percent = Annotated[float, Meta(ge=0, le=100)]
_Mean = Annotated[float, Meta(ge=0, le=1)]
_Std = Annotated[float, Meta(gt=0, le=1)]


class Published(Struct, frozen=True, forbid_unknown_fields=True):
    """Figures that the field reports for an architecture: millions, 10⁹ multiply-adds at 224 px, percent.

    Those of the training and the deploy form are a RepVGG's; `params_m` and `gflops` are those of a net of one form.
    """

    train_params_m: _Figure | None = None
    deploy_params_m: _Figure | None = None
    train_gflops: _Figure | None = None
    deploy_gflops: _Figure | None = None
    params_m: _Figure | None = None
    gflops: _Figure | None = None
    top1: _Percent | None = None
    top5: _Percent | None = None


@dataclass(frozen=True)
class Card:
    """A named architecture, as one file of `models/` describes it; `blocks` are those of the stages after the stem."""

    name: str
    blocks: tuple[int, ...]
    classes: int
    preprocessing: Preprocessing
    published: Published
    source: str


@dataclass(frozen=True)
class BaselineCard(Card):
    """A net to compare with: a ResNet of plain or `bottleneck` blocks, or a VGG, whose blocks are convolutions."""

    family: Literal["resnet", "vgg"]
    bottleneck: bool


@dataclass(frozen=True)
class RepVGGCard(Card):
    """A RepVGG.

    Attributes:
        widths: channels of the stages after the stem.
        stem: channels of the stem.
        groups: of the layers `grouped_layers`, which are counted from 0, the stem.
        se_ratio: channels of a block for each hidden channel of its squeeze-excite; 0 where there is none.
        se_position: of the squeeze-excite: before or after the activation.
    """

    widths: tuple[int, ...]
    stem: int
    groups: int
    grouped_layers: tuple[int, ...]
    se_ratio: int
    se_position: Literal["before", "after"]

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


class _Images(Struct, frozen=True, forbid_unknown_fields=True):
    """The table `preprocessing`: a net's square size, what the short side is resized to, and per channel."""

    size: _Pixels
    resize: _Pixels
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Std, _Std, _Std]


class _File(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="family"):
    """What every file of `models/` may have; its `family` says what the table `arch` has."""

    name: Line
    source: Line
    preprocessing: _Images
    classes: _Classes = 1000
    class_names: tuple[Line, ...] | None = None
    published: Published = Published()

    def values(self) -> dict[str, Any]:
        """The fields that all cards share, but the blocks."""
        images = self.preprocessing
        return {
            "name": self.name,
            "classes": self.classes,
            "preprocessing": Preprocessing(images.size, images.size, images.resize, images.mean, images.std),
            "published": self.published,
            "source": self.source,
        }


class _RepVGGArch(Struct, frozen=True, forbid_unknown_fields=True):
    blocks: tuple[_Count, _Count, _Count, _Count]
    width_multipliers: tuple[_Multiplier, _Multiplier, _Multiplier, _Multiplier]
    stem: _Channels | None = None
    groups: _Channels = 1
    se_ratio: Annotated[int, Meta(ge=0, le=64)] = 0
    se_position: Literal["before", "after"] = "before"


class _RepVGGFile(_File, frozen=True, kw_only=True, tag="repvgg"):
    arch: _RepVGGArch

    def card(self) -> RepVGGCard:
        arch = self.arch
        widths = tuple(int(base * by) for base, by in zip((64, 128, 256, 512), arch.width_multipliers, strict=True))
        return RepVGGCard(
            **self.values(),
            blocks=arch.blocks,
            widths=widths,
            # As in the official repvgg.py.
            stem=arch.stem or min(64, widths[0]),
            groups=arch.groups,
            # Paper section 4.1: every second layer, counted from 1 at the first block after the stem, up to 26.
            grouped_layers=tuple(range(2, 27, 2)) if arch.groups > 1 else (),
            se_ratio=arch.se_ratio,
            se_position=arch.se_position,
        )


class _ResNetArch(Struct, frozen=True, forbid_unknown_fields=True):
    blocks: tuple[_Count, _Count, _Count, _Count]
    bottleneck: bool


class _ResNetFile(_File, frozen=True, kw_only=True, tag="resnet"):
    arch: _ResNetArch

    def card(self) -> BaselineCard:
        arch = self.arch
        return BaselineCard(**self.values(), blocks=arch.blocks, family="resnet", bottleneck=arch.bottleneck)


class _VggArch(Struct, frozen=True, forbid_unknown_fields=True):
    blocks: tuple[_Count, _Count, _Count, _Count, _Count]


class _VggFile(_File, frozen=True, kw_only=True, tag="vgg"):
    arch: _VggArch

    def card(self) -> BaselineCard:
        return BaselineCard(**self.values(), blocks=self.arch.blocks, family="vgg", bottleneck=False)


_Files: Any = _RepVGGFile | _ResNetFile | _VggFile


def read_card(path: Path) -> RepVGGCard | BaselineCard:
    """The card in a file.

    Raises:
        DeployError: it cannot be read, or a field is missing, unknown, of another type, or out of its bounds.
    """
    name, hint = f"the card {path}", "models/ has examples"
    values = parse_toml(read_file(path, name, hint), name, hint)
    file: _RepVGGFile | _ResNetFile | _VggFile = convert(values, _Files, name, hint)
    if file.class_names is not None and len(file.class_names) != file.classes:
        raise DeployError(f"{name}: class_names: {len(file.class_names)} for {file.classes} classes", hint)
    card = file.card()
    if isinstance(card, RepVGGCard):
        blocks = card.spec().blocks
        if any(block.in_channels % block.groups or block.out_channels % block.groups for block in blocks):
            raise DeployError(f"{name}: arch.groups: {card.groups} does not divide the widths {card.widths}", hint)
        if card.se_ratio > min(card.stem, *card.widths) or 0 in card.widths:
            raise DeployError(f"{name}: arch: the widths {card.widths} are too small", hint)
    return card


@cache
def _read_cards() -> tuple[RepVGGCard | BaselineCard, ...]:
    return tuple(read_card(path) for path in sorted(data_folder("models").glob("*.toml")))


@cache
def load_cards() -> Mapping[str, RepVGGCard]:
    """All RepVGGs of `models/`, by name, in the order of their training-form size."""
    cards = [card for card in _read_cards() if isinstance(card, RepVGGCard)]
    cards.sort(key=lambda card: card.published.train_params_m or 0.0)
    return {card.name: card for card in cards}


@cache
def load_baselines() -> Mapping[str, BaselineCard]:
    """All nets of `models/` to compare with, by name, in the order of their multiply-adds."""
    cards = [card for card in _read_cards() if isinstance(card, BaselineCard)]
    cards.sort(key=lambda card: card.published.gflops or 0.0)
    return {card.name: card for card in cards}


def find_baseline(name: str) -> BaselineCard | None:
    """The card that a user means by `resnet50` or `ResNet-50`; None if there is none of that name."""
    wanted = _letters(name)
    return next((card for card in load_baselines().values() if _letters(card.name) == wanted), None)


def require_baseline(name: str) -> BaselineCard:
    """As `find_baseline`.

    Raises:
        DeployError: no card has that name; the hint lists those there are.
    """
    card = find_baseline(name)
    if card is None:
        raise DeployError(f"no baseline is called {name!r}", f"one of: {', '.join(baseline_names())}")
    return card


def baseline_names() -> list[str]:
    """The names of all baselines, as they are typed: `resnet50`."""
    return [_letters(name) for name in load_baselines()]


def find_card(name: str) -> RepVGGCard:
    """The card that a user means by `A0`, `repvgg_a0`, timm's `repvgg_a0.rvgg_in1k`, or a file's `RepVGG-A0-train`.

    Raises:
        DeployError: no card has that name; the hint lists those there are.
    """
    found = find_named_card(name)
    if found is not None:
        return load_cards()[found]
    raise DeployError(f"no architecture is called {name!r}", f"one of: {', '.join(arch_names())}")


def arch_names() -> list[str]:
    """The names of all RepVGGs, as they are typed: `A0`."""
    return [name.removeprefix("RepVGG-") for name in load_cards()]


def find_named_card(name: str) -> str | None:
    """The name of the one card that a name of any library contains; None if it contains none, or several.

    Folders before the name do not count.
    """
    short = {_plain(card): card for card in load_cards()}
    words = re.split(r"[^a-z0-9]+", name.lower().rpartition("/")[2])
    found = {short[word] for word in map(_plain, words) if word in short}
    whole = short.get(_plain(name))
    return whole if whole is not None else found.pop() if len(found) == 1 else None


def _plain(name: str) -> str:
    return _letters(name).removeprefix("repvgg").removeprefix("plus")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def match_card(spec: ArchSpec) -> RepVGGCard | None:
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


def require_arch(path: Path, provenance: Provenance | None, arch: str | None) -> None:
    """Raise DeployError if a graph or an engine is not of the architecture that the caller expects, or does not say."""
    if arch is None:
        return
    wanted = find_card(arch).name
    found = provenance.arch if provenance is not None else "a net of unknown architecture"
    if found != wanted and not found.startswith(wanted + " "):
        raise DeployError(
            f"{path} contains {found}, not {wanted}", "leave --arch out, or give the model that you meant"
        )
