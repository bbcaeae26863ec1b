"""Text from files cannot drive a terminal, nor pass for a line of this program."""

from __future__ import annotations

import json

import pytest

from repvgg_deploy.files.printable import dump_json, printable

DRIVING = ["\x1b[31m", "\r", "\n", "\x9b2J", "\x7f", "\u202e", "\u2028", "\ud800", "\0"]


@pytest.mark.parametrize("text", DRIVING)
def test_what_drives_a_terminal_is_escaped(text: str) -> None:
    shown = printable(f"a{text}b")
    assert shown.isprintable()
    assert shown.startswith("a\\")
    assert shown.endswith("b")


def test_text_in_any_script_stays_as_it_is() -> None:
    assert printable("Größe 猫 🐈 a b") == "Größe 猫 🐈 a b"


def test_long_text_is_cut() -> None:
    assert printable("x" * 300) == "x" * 200 + "…"
    assert printable("x" * 300, 400) == "x" * 300


@pytest.mark.parametrize("text", [*DRIVING, "\U000e0001", "\xa0"])
def test_json_has_escapes_for_it_and_says_the_same(text: str) -> None:
    value = {f"key{text}": ["猫", text, 1.5]}
    for indent in (None, 2):
        written = dump_json(value, indent)
        assert written.replace("\n", "").isprintable()
        assert "猫" in written
        assert json.loads(written) == value


def test_json_of_numbers_that_are_none_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"x": float("nan")})
