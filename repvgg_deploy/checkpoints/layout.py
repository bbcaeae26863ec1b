"""How a library names the tensors of a RepVGG, and the translation to this package's canonical names and back.

Canonical names are those of `nets.repvgg.RepVGG`: `stages.S.B.branch_3x3.conv.weight`, `stages.S.B.conv.bias` in deploy
form, `classifier.weight`; stage 0 is the stem.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from repvgg_deploy.nets.spec import TRAINING_BRANCHES, Branch


@dataclass(frozen=True)
class Segment:
    """A run of blocks: `prefix` with `{b}` for the block's index, or without where it is a single block."""

    prefix: str
    stage: int

    @property
    def words(self) -> tuple[str, ...]:
        """The prefix, word by word."""
        return tuple(self.prefix.split("."))


@dataclass(frozen=True)
class Layout:
    """One library's names.

    `parts` maps a module inside a block to the canonical one; `head` is the linear layer; `ignored` are tensors that
    inference does not need; `branches` (the identity where the shape allows it) and `norm_after_sum` are what every
    block in training form consists of.
    """

    name: str
    segments: tuple[Segment, ...]
    parts: Mapping[str, str]
    head: str
    ignored: str = r"$^"
    branches: tuple[Branch, ...] = TRAINING_BRANCHES
    norm_after_sum: bool = False
    _by_canonical: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inverse: dict[str, str] = {}
        for name, canonical in self.parts.items():
            inverse.setdefault(canonical, name)
        object.__setattr__(self, "_by_canonical", inverse)

    @property
    def vocabulary(self) -> frozenset[str]:
        """The words that this layout's names of parts consist of."""
        return frozenset(word for part in self.parts for word in part.split("."))

    def name_keys(self, found: Mapping[str, Match], prefix: str = "") -> KeyMap:
        """The canonical name of each key in `found`, all of which lie under `prefix`."""
        lengths: dict[int, int] = {}
        for match in found.values():
            lengths[match.segment] = max(lengths.get(match.segment, 0), match.block + 1)
        offsets: dict[int, int] = {}
        for number, segment in enumerate(self.segments):
            before = [n for n in range(number) if self.segments[n].stage == segment.stage]
            offsets[number] = sum(lengths.get(n, 0) for n in before)
        names = {
            key: f"stages.{self.segments[m.segment].stage}.{m.block + offsets[m.segment]}.{self.parts[m.part]}.{m.leaf}"
            for key, m in found.items()
        }
        return KeyMap(self, names, {n: (offsets[n], lengths.get(n, 0)) for n in offsets}, prefix)

    def is_ignored(self, key: str) -> bool:
        """Whether inference has no use for the tensor `key`."""
        return key.endswith(".num_batches_tracked") or re.search(self.ignored, key) is not None


@dataclass(frozen=True)
class Match:
    """Where in a layout a key belongs: its segment and block, the part of the block, the tensor of the part.

    `wrappers` are words of the key that are none of the layout's, as `_fsdp_wrapped_module` is.
    """

    segment: int
    block: int
    part: str
    leaf: str
    wrappers: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeyMap:
    """The keys of one net under a layout: `names` maps the file's key to the canonical one.

    `prefix`: what the layout's own names have before them, with a dot at its end; or nothing.
    """

    layout: Layout
    names: Mapping[str, str]
    spans: Mapping[int, tuple[int, int]]
    prefix: str = ""

    def file_key(self, canonical: str) -> str:
        """What the file calls, or should call, the tensor of this canonical name."""
        if canonical.startswith("classifier."):
            # OpenMMLab's head is beside the backbone, not in it.
            return f"{self.prefix.removesuffix('backbone.')}{canonical.replace('classifier', self.layout.head, 1)}"
        _, stage, block, rest = canonical.split(".", 3)
        part, _, leaf = rest.rpartition(".")
        name = self.layout._by_canonical.get(part, part)
        numbers = [n for n, segment in enumerate(self.layout.segments) if segment.stage == int(stage)]
        # The last segment of the stage that begins at or before this block.
        number = max((n for n in numbers if self.spans[n][0] <= int(block)), default=numbers[0])
        prefix = self.layout.segments[number].prefix.replace("{b}", str(int(block) - self.spans[number][0]))
        return f"{self.prefix}{prefix}.{name}.{leaf}"


def numbered_stages(prefix: str, first: int = 1, last: int = 9) -> tuple[Segment, ...]:
    """Segments for `prefix` with `{s}` for a stage number from `first`, which is stage 1; `{b}` for the block."""
    return tuple(Segment(prefix.replace("{s}", str(s)), s - first + 1) for s in range(first, last + 1))
