"""What a pickle says without anything being done: records instead of objects, and plain data made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MAX_DEPTH = 40
_MAX_VALUES = 200_000


@dataclass(frozen=True, eq=False)
class Inert:
    """An object of a pickle that was not made: whose it is, and what it would have been made from.

    Attributes:
        module: where its class or function is defined, by the pickle's own words.
        name: the class or function.
        args: what it would have been called with; None for the class or function itself.
        state: what its `__setstate__` or `__dict__` would have been given.
        items: what a dict of this class holds.
        elements: what a list or set of this class holds.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    @property
    def full_name(self) -> str:
        """The module and the name, as Python writes them."""
        return f"{self.module}.{self.name}" if self.module else self.name

    def set_state(self, state: Any) -> None:
        """Keep what the pickle says of a record that exists already; for the reader of pickles alone."""
        object.__setattr__(self, "state", state)


def attributes_of(value: Any) -> Mapping[str, Any]:
    """What `value` holds by name: a dict's items, or an inert record's items, or else its attributes; else nothing.

    So a `dict`, a yacs `CfgNode`, an `argparse.Namespace` and an OmegaConf `DictConfig` read alike.
    """
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if isinstance(key, str)}
    if not isinstance(value, Inert):
        return {}
    if value.items:
        return attributes_of(value.items)
    found: dict[str, Any] = {}
    # A state of two parts: the `__dict__`, and the `__slots__`.
    parts = value.state if isinstance(value.state, tuple) else (value.state,)
    for part in parts:
        if isinstance(part, Mapping):
            found |= attributes_of(part)
    content = found.get("_content")
    return attributes_of(content) if value.module.startswith("omegaconf") and content is not None else found


def to_plain(value: Any, is_left_out: Callable[[Any], bool]) -> Any:
    """`value` as a tree of dicts with string keys, lists, tuples, text, numbers and `Inert`s; a copy of bounded size.

    What `is_left_out`, what is none of these, and what contains itself becomes None; so does the rest of a tree
    that is deeper or larger than any configuration.
    """
    return _Copy(is_left_out).copy(value, 0)


class _Copy:
    def __init__(self, is_left_out: Callable[[Any], bool]) -> None:
        self._is_left_out = is_left_out
        self._left = _MAX_VALUES
        self._open: set[int] = set()

    def copy(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH or id(value) in self._open or self._is_left_out(value):
            return None
        if value is None or isinstance(value, str | int | float | complex | bytes):
            return value
        self._open.add(id(value))
        try:
            return self._copy_container(value, depth + 1)
        finally:
            self._open.discard(id(value))

    def _copy_container(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return self._copy_dict(value, depth)
        if isinstance(value, list):
            return [self.copy(item, depth) for item in value[: max(self._left, 0)]]
        if isinstance(value, tuple):
            return tuple(self.copy(item, depth) for item in value[: max(self._left, 0)])
        if isinstance(value, Inert):
            args = None if value.args is None else self.copy(value.args, depth)
            return Inert(
                value.module,
                value.name,
                args,
                self.copy(value.state, depth),
                self._copy_dict(value.items, depth),
                [self.copy(item, depth) for item in value.elements[: max(self._left, 0)]],
            )
        return None

    def _copy_dict(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        copied = {}
        for key, item in value.items():
            if self._left <= 0:
                break
            if isinstance(key, str) and not self._is_left_out(item):
                copied[key] = self.copy(item, depth)
        return copied
