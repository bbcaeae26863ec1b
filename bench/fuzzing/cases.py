"""One case: a command, the files that it is given, and what to hold its output against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random


class UnreadableError(Exception):
    """The libraries do not read the file, or what they read is no net that the oracle's formula is for."""


Check = Callable[[Path, Path], str | None]
"""From the folders of the inputs and of the outputs: what is wrong with the outputs, or None."""


@dataclass(frozen=True)
class Case:
    """A command that is run on mutated files.

    Attributes:
        arguments: of `repvgg-deploy`; `IN` and `OUT` at the beginning of one stand for the folders.
        files: what lies in `IN`, by name.
        mutation: what was done to them.
        places: what else lies in the folders `in` and `out`: a `folder`, `file`, `fifo`, `loop` or `dangling` link.
        check: holds the outputs of a run with exit status 0 against an oracle.
        before: what lies in `OUT`, by name, as an earlier run has left it.
        prepare: called with the case's folder once all of that is there.
        after: holds what lies in the folders after any other exit status against an oracle.
    """

    arguments: tuple[str, ...]
    files: Mapping[str, bytes]
    mutation: str
    check: Check | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, bytes] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    after: Check | None = None


Maker = Callable[[Random], Case]


@dataclass(frozen=True)
class Format:
    """A kind of input; `weight` is how many cases of a round are of it."""

    name: str
    make: Maker = field(repr=False)
    weight: int = 1
