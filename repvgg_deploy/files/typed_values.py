"""Values from files, held to types: any mismatch is one error that names the file and the field."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec

from repvgg_deploy.errors import DeployError

Value = TypeVar("Value")

Line = Annotated[str, msgspec.Meta(max_length=1000, pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*\Z")]
"""A text that is printed: one line without control characters."""

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]

_MOST_BYTES = 16 << 20
"""Recipes, suites and cards are a few kilobytes; a limit keeps one that is not from filling the memory."""


def read_file(path: Path, name: str, hint: str, most_bytes: int = _MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most_bytes`; `name` is the file's in messages.

    Raises:
        FileNotFoundError: there is no such file.
        DeployError: it cannot be read, is too large, or is a folder, a pipe or a device; `hint` says what to do.
    """
    try:
        # A pipe without a writer would block.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise DeployError(f"{name} is not a regular file", hint)
            if about.st_size > most_bytes:
                raise DeployError(f"{name} is too large: {about.st_size} bytes", hint)
            # The buffer is as large as the number, so it is no larger than the file.
            content = file.read(about.st_size + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DeployError(f"cannot read {name}: {_say(reason)}", hint) from error
    if len(content) != about.st_size:
        raise DeployError(f"{name} was written to while it was read", hint)
    return content


def parse_json(content: bytes, name: str, hint: str) -> Any:
    """The value in a JSON text; `name` is the file's in messages.

    Stricter than Python's `json`: no Infinity, no NaN, no lone surrogates, no numbers beyond 64 bits.

    Raises:
        DeployError: it is not JSON, or nested too deeply; `hint` says what to do.
    """
    try:
        return msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DeployError(f"cannot read {name}: {_say(str(error))}", hint) from error


def parse_toml(content: bytes, name: str, hint: str) -> dict[str, Any]:
    """The table in a TOML text; `name` is the file's in messages.

    Raises:
        DeployError: it is not TOML, or nested too deeply; `hint` says what to do.
    """
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DeployError(f"cannot read {name}: {_say(str(error))}", hint) from error


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML that reads as `table`: numbers, texts, truth values, lists of these, and tables of all that, one level deep.

    What is None is left out.
    """
    lines = _toml_lines({key: value for key, value in table.items() if not isinstance(value, Mapping)})
    for name, values in table.items():
        if isinstance(values, Mapping):
            lines += [*([""] if lines else []), f"[{_toml_key(name)}]", *_toml_lines(values)]
    return "\n".join(lines) + "\n"


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in values.items() if value is not None]


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        # A list of texts, such as files, is one text per line.
        if len(value) > 1 and all(isinstance(item, str) for item in value) and sum(map(len, value)) > 80:
            return "[\n" + "".join(f"    {_toml_value(item)},\n" for item in value) + "]"
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # The strings of JSON are strings of TOML, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def convert(values: Any, kind: type[Value], name: str, hint: str) -> Value:
    """`values` as a dataclass or `msgspec.Struct`; numbers, texts, lists and tables must be what its fields say.

    Raises:
        DeployError: a field is missing, unknown to a strict struct, of another type, or out of its bounds.
    """
    try:
        return msgspec.convert(values, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        what, found, field = str(error).partition(" - at `$")
        what = what.replace("Object missing required field", "missing field")
        what = what.replace("Object contains unknown field", "unknown field")
        where = f"{name}: {_say(field.rstrip('`').lstrip('.'))}" if found else name
        raise DeployError(f"{where}: {_say(what)}", hint) from error


def require_known(values: Any, kind: type[Any], name: str, hint: str) -> None:
    """Raise DeployError if a table in `values` has a key that the dataclass `kind`, or a field's own, does not have.

    `convert` skips such keys of a dataclass; in a file that people write, they are typing errors.
    """
    if not isinstance(values, dict):
        return
    known = get_type_hints(kind)
    for key, value in values.items():
        if key not in known:
            raise DeployError(f"{name}: unknown field `{_say(key)}`; known: {', '.join(sorted(known))}", hint)
        if is_dataclass(known[key]):
            require_known(value, known[key], f"{name}: {key}", hint)


def _say(text: str) -> str:
    """One printable line: what is quoted comes from the file."""
    return re.sub(r"[^\x20-\x7e\u00a0-\ud7ff\uf900-\uffff]+", "?", text)
