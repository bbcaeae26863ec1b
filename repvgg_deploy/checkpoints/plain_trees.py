"""Records of objects in a configuration as dicts, lists and names, as far as a setting may be in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repvgg_deploy.checkpoints.inert import Inert, attributes_of

_MAX_DEPTH = 30


def as_tree(value: Any, depth: int = 0) -> Any:
    """`value` with each record replaced by what it holds: its items and attributes, or the name of a class.

    A module becomes `{"type": "LeakyReLU", "negative_slope": 0.1}`, as a configuration would write it; an enumeration's
    member, a node of OmegaConf and a `functools.partial` become what they stand for. What is deeper than any
    configuration becomes None.
    """
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, Mapping):
        # Of a module what it consists of says its own; see `read_modules`.
        hidden = "_" if "_modules" in value else None
        kept = ((str(key), item) for key, item in value.items())
        return {key: as_tree(item, depth + 1) for key, item in kept if hidden is None or not key.startswith(hidden)}
    if isinstance(value, list | tuple):
        return [as_tree(item, depth + 1) for item in value]
    return _of_record(value, depth + 1) if isinstance(value, Inert) else value


def _of_record(record: Inert, depth: int) -> Any:
    state = record.state
    if isinstance(state, Mapping):
        for content in ("_content", "_val"):
            if content in state and record.module.startswith("omegaconf"):
                return as_tree(state[content], depth)
    if record.name == "partial" and isinstance(state, tuple) and len(state) == 4:
        return _of_partial(state, depth)
    attributes = attributes_of(record)
    if attributes:
        plain = as_tree(attributes, depth)
        return {"type": record.name, **plain} if record.module.startswith("torch.nn") else plain
    if record.elements:
        return as_tree(record.elements, depth)
    if record.args is not None and len(record.args) == 1 and isinstance(record.args[0], str | int):
        return record.args[0]
    return record.name


def _of_partial(state: tuple[Any, ...], depth: int) -> Any:
    function, arguments, keywords, _ = state
    named = as_tree(keywords, depth) if isinstance(keywords, Mapping) else {}
    if isinstance(arguments, tuple) and len(arguments) == 1:
        # Of the activations only a leaky ReLU has a parameter.
        named = {"negative_slope": arguments[0], **named}
    return {"type": as_tree(function, depth), **named}
