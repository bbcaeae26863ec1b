"""Values of files held to types: one error that names the file and the field."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.typed_values import convert, parse_json, parse_toml


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str = "none"


def test_values_become_dataclasses() -> None:
    values = parse_json(b'{"inner": {"sizes": [1, 2]}}', "the file", "a hint")
    assert convert(values, Outer, "the file", "a hint") == Outer(Inner((1, 2)))
    assert parse_toml(b"inner.sizes = [1, 2]", "the file", "a hint") == values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "the file: missing field `inner`"),
        ({"inner": {"sizes": [1, "2"]}}, "the file: inner.sizes[1]: Expected `int`, got `str`"),
        ({"inner": {"sizes": [True]}}, "the file: inner.sizes[0]: Expected `int`, got `bool`"),
        ([], "the file: Expected `object`, got `array`"),
    ],
)
def test_what_does_not_fit_is_named(values: object, said: str) -> None:
    with pytest.raises(DeployError) as raised:
        convert(values, Outer, "the file", "a hint")
    assert (raised.value.message.replace("[...]", "[0]"), raised.value.hint) == (said, "a hint")


@pytest.mark.parametrize("parse", [parse_json, parse_toml])
@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"a = " + b"9" * 5000, b'"\x1b[31m\\nerror: forged'])
def test_what_cannot_be_read_is_one_printable_line(parse: object, content: bytes) -> None:
    with pytest.raises(DeployError, match="cannot read the file: ") as raised:
        parse(content, "the file", "a hint")  # type: ignore[operator]
    assert raised.value.message.isprintable()
