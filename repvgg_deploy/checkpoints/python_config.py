"""Configurations that are Python text, as mmengine's are: read as data, never executed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

_MAX_TEXT = 1 << 20
_MAX_DEPTH = 60


class _Unknown:
    """The value of what is not a literal: a call of anything but `dict`, an import, arithmetic."""


UNKNOWN = _Unknown()


def read_python_config(text: str) -> dict[str, Any]:
    """The top-level assignments of literals in `text`, by name; `dict(a=1)` counts as one, all else is left out.

    Text that is not Python, is larger than 1 MiB, or nests too deeply gives an empty dict.
    """
    if len(text) > _MAX_TEXT:
        return {}
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, Any] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        value = _literal(statement.value, found, 0)
        found |= {target.id: value for target in targets if isinstance(target, ast.Name) and value is not UNKNOWN}
    return found


def _literal(node: ast.expr, known: Mapping[str, Any], depth: int) -> Any:
    """The value of an expression, or `UNKNOWN`; a container is known as far as its items are."""
    if depth > _MAX_DEPTH:
        return UNKNOWN
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id, UNKNOWN)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, known, depth + 1)
        return -value if isinstance(value, int | float) else UNKNOWN
    if isinstance(node, ast.List | ast.Tuple):
        items = [_literal(item, known, depth + 1) for item in node.elts]
        return items if UNKNOWN not in items else UNKNOWN
    if isinstance(node, ast.Dict):
        pairs = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
        named = [(_literal(key, known, depth + 1), value) for key, value in pairs]
        return _dictionary([(key, value) for key, value in named if isinstance(key, str)], known, depth)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return _dictionary([(item.arg, item.value) for item in node.keywords if item.arg is not None], known, depth)
    return UNKNOWN


def _dictionary(items: list[tuple[str, ast.expr]], known: Mapping[str, Any], depth: int) -> dict[str, Any]:
    values = ((key, _literal(value, known, depth + 1)) for key, value in items)
    return {key: value for key, value in values if value is not UNKNOWN}
