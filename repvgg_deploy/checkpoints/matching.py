"""The nets in a file: names that are a layout's own, after any prefix, with any wrappers in between."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from repvgg_deploy.checkpoints.known_layouts import LAYOUTS
from repvgg_deploy.checkpoints.layout import KeyMap, Layout, Match

_LEAVES = frozenset("weight bias running_mean running_var num_batches_tracked".split())  # noqa: SIM905
_NUMBER = re.compile(r"0|[1-9]\d{0,3}")
_MAX_WORDS = 40


@dataclass(frozen=True)
class FoundNet:
    """The blocks of one net: under which prefix, in which dict, and their names in it.

    Attributes:
        prefix: what is before the layout's own names in the whole file, without a dot at its end.
        place: the dict or module in which the tensors lie: the beginning of `prefix`, or all of it.
        keys: the canonical name of each tensor, by its name in `place`.
    """

    prefix: str
    place: str
    keys: KeyMap

    def full_name(self, key: str) -> str:
        """The name in the whole file of a tensor of this net's place."""
        return f"{self.place}.{key}" if self.place else key


def find_nets(places: Mapping[str, str]) -> list[FoundNet]:
    """Each set of names that share a prefix and have, after it, those of a layout's blocks; in the file's order.

    Args:
        places: all names in a file, and the place in which each lies.
    """
    tables = [_Table(layout) for layout in LAYOUTS]
    # By prefix, the matches of each layout.
    found: dict[str, list[dict[str, Match]]] = {}
    for name in places:
        words = name.split(".")
        if words[-1] not in _LEAVES or len(words) > _MAX_WORDS:
            continue
        for number, table in enumerate(tables):
            position, match = table.match(words)
            if match is not None:
                prefix = ".".join(words[:position])
                found.setdefault(prefix, [{} for _ in tables])[number][name] = match
    nets = []
    for prefix, by_layout in found.items():
        kept = [_without_strangers(matches) for matches in by_layout]
        best = max(range(len(tables)), key=lambda n: (len(kept[n]), -sum(bool(m.wrappers) for m in kept[n].values())))
        if kept[best]:
            nets.append(_describe(tables[best].layout, prefix, kept[best], places))
    return nets


def _describe(layout: Layout, prefix: str, matches: Mapping[str, Match], places: Mapping[str, str]) -> FoundNet:
    words = prefix.split(".") if prefix else []
    for name in matches:
        around = places[name].split(".") if places[name] else []
        words = words[: next((n for n, (a, b) in enumerate(zip(words, around, strict=False)) if a != b), len(around))]
    place = ".".join(words)
    start = len(place) + 1 if place else 0
    inner = prefix[start:]
    keys = layout.name_keys({name[start:]: m for name, m in matches.items()}, f"{inner}." if inner else "")
    return FoundNet(prefix, place, keys)


class _Table:
    """A layout's names, by their first word."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._vocabulary = layout.vocabulary
        self._by_first: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
        for number, segment in enumerate(layout.segments):
            self._by_first.setdefault(segment.words[0], []).append((number, segment.words[1:]))

    def match(self, words: list[str]) -> tuple[int, Match | None]:
        """Where in `words` a name of this layout begins, and which it is."""
        for position, word in enumerate(words):
            for number, others in self._by_first.get(word, ()):
                match = self._match_rest(number, others, words[position + 1 : -1])
                if match is not None:
                    return position, replace(match, leaf=words[-1])
        return 0, None

    def _match_rest(self, number: int, others: tuple[str, ...], words: list[str]) -> Match | None:
        block, wrappers, left = 0, [], list(others)
        part = []
        for word in words:
            if left and left[0] == "{b}" and _NUMBER.fullmatch(word):
                block = int(word)
                del left[0]
            elif left and left[0] == word:
                del left[0]
            elif word.isdigit() or (word in self._vocabulary and not left):
                part.append(word)
            else:
                wrappers.append(word)
        name = ".".join(part)
        if left or name not in self.layout.parts:
            return None
        return Match(number, block, name, "", tuple(wrappers))


def _without_strangers(matches: Mapping[str, Match]) -> dict[str, Match]:
    """The matches whose additional words are wrappers: of torch, or around at least half of the blocks.

    Where two keys would be one tensor, the one without wrappers is.
    """
    around: dict[str, set[tuple[int, int]]] = {}
    for match in matches.values():
        for word in match.wrappers:
            around.setdefault(word, set()).add((match.segment, match.block))
    blocks = len({(match.segment, match.block) for match in matches.values()})
    wrappers = {w for w, where in around.items() if w.startswith("_") or w == "module" or 2 * len(where) >= blocks > 1}
    taken: dict[tuple[int, int, str, str], str] = {}
    for name, match in sorted(matches.items(), key=lambda item: len(item[1].wrappers)):
        if wrappers.issuperset(match.wrappers):
            taken.setdefault((match.segment, match.block, match.part, match.leaf), name)
    kept = set(taken.values())
    return {name: match for name, match in matches.items() if name in kept}
