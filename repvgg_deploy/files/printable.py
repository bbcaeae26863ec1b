"""Text from files on its way to a terminal or a log: on one line, and without what drives either."""

from __future__ import annotations

import json
from typing import Any


def printable(text: str, limit: int = 200) -> str:
    """`text` on one line of any terminal: control characters and what UTF-8 has no bytes for are escaped."""
    shown = text if len(text) <= limit else f"{text[:limit]}…"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def dump_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that is readable where it can be: what `printable` escapes has JSON's own escapes instead.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    if text.replace("\n", "").isprintable():
        return text
    # Outside strings JSON has nothing but ASCII.
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)
