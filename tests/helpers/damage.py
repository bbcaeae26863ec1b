"""Damage that is made systematically: to each field of a tree of values, and to the bytes of a file."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

WRONG = (None, True, "x", "\x1b[31m\nerror: forged", [], {}, [[]], math.nan, math.inf, -1e300, 1e300, -(10**30), 10**30)
"""Values of every type, and numbers outside all bounds."""

Place = tuple[str | int, ...]


def places(values: Any, place: Place = ()) -> Iterator[Place]:
    """Each field of a tree of tables and lists; of a list, the first item only."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from places(value, (*place, key))


def without(values: Any, place: Place) -> Any:
    """A copy of the tree without the field `place`."""
    changed = copy.deepcopy(values)
    del find(changed, place[:-1])[place[-1]]
    return changed


def replaced(values: Any, place: Place, value: Any) -> Any:
    """A copy of the tree with `value` as the field `place`."""
    changed = copy.deepcopy(values)
    find(changed, place[:-1])[place[-1]] = value
    return changed


def find(values: Any, place: Place) -> Any:
    """The field `place` of a tree."""
    for key in place:
        values = values[key]
    return values


def wrong_for(value: Any) -> list[Any]:
    """The values that a field, which has this value, cannot have."""
    kinds = (bool,) if isinstance(value, bool) else (int, float) if isinstance(value, int | float) else (type(value),)
    return [
        wrong
        for wrong in WRONG
        if not isinstance(wrong, kinds)
        or (isinstance(wrong, bool) and bool not in kinds)
        or (isinstance(wrong, int | float) and not isinstance(wrong, bool))
    ]


def to_toml(values: Mapping[str, Any]) -> str:
    """The values as TOML, tables within them on one line; what TOML has no word for is a list of nothing."""
    return "".join(f"{json.dumps(key)} = {_toml_value(value)}\n" for key, value in values.items())


def _toml_value(value: Any) -> str:
    if value is None:
        return "[]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return json.dumps(value)


def truncated(content: bytes, count: int = 12) -> list[bytes]:
    """The beginnings of a file, from nothing to all but the last byte."""
    return [content[: (len(content) - 1) * part // (count - 1)] for part in range(count)]


UNREADABLE = (
    b"", b"\xff\xfe", b"\0" * 100, b"[" * 100_000, b"{" * 100_000, b"a = " + b"9" * 5000, b'"\\ud800"', b"[1, 2",
)  # fmt: skip
"""What is neither JSON nor TOML, or is nested or long beyond reason; the first is empty, which TOML may be."""
