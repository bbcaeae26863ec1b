"""The named architectures: `Card`, read from `models/*.toml`."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from repvgg_deploy.artifacts import Preprocessing, Provenance
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files import data_folder
from repvgg_deploy.nets.spec import ArchSpec, BlockSpec, SqueezeExcite, training_branches


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
    """The card that a user means by `A0`, `repvgg_a0`, timm's `repvgg_a0.rvgg_in1k`, or a file's `RepVGG-A0-train`.

    Raises:
        DeployError: no card has that name; the hint lists those there are.
    """
    found = find_named_card(name)
    if found is not None:
        return load_cards()[found]
    names = ", ".join(card.removeprefix("RepVGG-") for card in load_cards())
    raise DeployError(f"no architecture is called {name!r}", f"one of: {names}")


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
