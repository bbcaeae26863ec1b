"""Values from files, held to types: any mismatch is one error that names the file and the field."""

from __future__ import annotations

import re
import tomllib
from typing import Any, TypeVar

import msgspec

from repvgg_deploy.errors import DeployError

Value = TypeVar("Value")


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


def _say(text: str) -> str:
    """One printable line: what is quoted comes from the file."""
    return re.sub(r"[^\x20-\x7e\u00a0-\ud7ff\uf900-\uffff]+", "?", text)
