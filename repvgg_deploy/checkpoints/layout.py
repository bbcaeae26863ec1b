"""How a library names the tensors of a RepVGG, and the translation to this package's canonical names and back.

Canonical names are those of `nets.repvgg.RepVGG`: `stages.S.B.branch_3x3.conv.weight`, `stages.S.B.conv.bias` in deploy
form, `classifier.weight`; stage 0 is the stem.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from repvgg_deploy.nets.spec import TRAINING_BRANCHES, Branch

_LEAVES = r"weight|bias|running_mean|running_var|num_batches_tracked"


@dataclass(frozen=True)
class Segment:
    """A run of blocks: `prefix` with `{b}` for the block's index, or without where it is a single block."""

    prefix: str
    stage: int

    def parse(self, key: str) -> tuple[int, str] | None:
        """The block's index and the rest of the key, if the key lies in this segment."""
        pattern = re.escape(self.prefix).replace(r"\{b\}", r"(?P<b>0|[1-9]\d{0,3})")
        match = re.match(pattern + r"\.(?P<rest>.+)", key)
        if match is None:
            return None
        return int(match.groupdict().get("b") or 0), match["rest"]


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

    def name_keys(self, keys: Iterable[str]) -> KeyMap:
        """The canonical name of every key that this layout knows."""
        split = {key: self._split(key) for key in keys}
        found = {key: parts for key, parts in split.items() if parts is not None}
        lengths: dict[int, int] = {}
        for number, block, _ in found.values():
            lengths[number] = max(lengths.get(number, 0), block + 1)
        offsets: dict[int, int] = {}
        for number, segment in enumerate(self.segments):
            before = [n for n in range(number) if self.segments[n].stage == segment.stage]
            offsets[number] = sum(lengths.get(n, 0) for n in before)
        names = {
            key: f"stages.{self.segments[number].stage}.{block + offsets[number]}.{rest}"
            for key, (number, block, rest) in found.items()
        }
        names |= {
            f"{self.head}.{leaf}": f"classifier.{leaf}" for leaf in ("weight", "bias") if f"{self.head}.{leaf}" in split
        }
        return KeyMap(self, names, {n: (offsets[n], lengths.get(n, 0)) for n in offsets})

    def _split(self, key: str) -> tuple[int, int, str] | None:
        for number, segment in enumerate(self.segments):
            parsed = segment.parse(key)
            if parsed is None:
                continue
            part, _, leaf = parsed[1].rpartition(".")
            if part in self.parts and re.fullmatch(_LEAVES, leaf):
                return number, parsed[0], f"{self.parts[part]}.{leaf}"
        return None

    def is_ignored(self, key: str) -> bool:
        """Whether inference has no use for the tensor `key`."""
        return key.endswith(".num_batches_tracked") or re.search(self.ignored, key) is not None


@dataclass(frozen=True)
class KeyMap:
    """The keys of one file under a layout: `names` maps file key to canonical key."""

    layout: Layout
    names: Mapping[str, str]
    spans: Mapping[int, tuple[int, int]]

    def file_key(self, canonical: str) -> str:
        """What the file calls, or should call, the tensor of this canonical name."""
        if canonical.startswith("classifier."):
            return canonical.replace("classifier", self.layout.head, 1)
        _, stage, block, rest = canonical.split(".", 3)
        part, _, leaf = rest.rpartition(".")
        name = self.layout._by_canonical.get(part, part)
        numbers = [n for n, segment in enumerate(self.layout.segments) if segment.stage == int(stage)]
        # The last segment of the stage that begins at or before this block.
        number = max((n for n in numbers if self.spans[n][0] <= int(block)), default=numbers[0])
        prefix = self.layout.segments[number].prefix.replace("{b}", str(int(block) - self.spans[number][0]))
        return f"{prefix}.{name}.{leaf}"


def numbered_stages(prefix: str, first: int = 1, last: int = 9) -> tuple[Segment, ...]:
    """Segments for `prefix` with `{s}` for a stage number from `first`, which is stage 1; `{b}` for the block."""
    return tuple(Segment(prefix.replace("{s}", str(s)), s - first + 1) for s in range(first, last + 1))
