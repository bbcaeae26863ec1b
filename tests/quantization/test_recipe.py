"""Recipes from files: what is missing has its default, and what is wrong is one error that names file and field."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.damage import UNREADABLE, Place, find, places, replaced, to_toml, truncated, without, wrong_for

from repvgg_deploy.errors import DeployError
from repvgg_deploy.quantization import Recipe, load_recipe

FILES = sorted((Path(__file__).parents[2] / "calibration").glob("*.toml"))
FULL = {**tomllib.loads(FILES[-1].read_text(encoding="utf-8")), "pictures": {"count": 8, "batch": 8, "steps": 5}}
FULL["full_range"] = True
FULL["pictures"] |= {"rate": 0.05, "multiply_adds": 20.0}
FIELDS = list(places(FULL))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.toml"


def refused(path: Path) -> str:
    with pytest.raises(DeployError) as raised:
        load_recipe(path)
    assert str(path) in raised.value.message
    assert raised.value.message.isprintable()
    assert raised.value.hint
    return raised.value.message


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipes_load_by_name(file: Path) -> None:
    assert load_recipe(file.stem).name == file.stem
    assert load_recipe(file) == load_recipe(file.stem)


def test_every_option_can_stand_in_a_file(path: Path) -> None:
    path.write_text(to_toml(FULL))
    recipe = dataclasses.asdict(load_recipe(path))
    written = {place for place in FIELDS if isinstance(place[-1], str)}
    assert written == {place for place in places(recipe) if isinstance(place[-1], str)}


def test_a_recipe_is_a_file_of_known_keys(path: Path) -> None:
    path.write_text("equalize = false\n[scales]\nthresholds = [0.5, 1.0]\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.equalize, recipe.scales.thresholds) == ("mine", None, (0.5, 1.0))
    assert recipe.dead_inputs == Recipe("mine").dead_inputs
    path.write_text("[rounding]\ndampings = 1.0\n")
    assert "rounding: unknown field `dampings`; known: damping, images, samples" in refused(path)


@pytest.mark.parametrize("place", FIELDS, ids=lambda place: ".".join(map(str, place)))
def test_each_field_may_be_missing_and_none_may_be_wrong(place: Place, path: Path) -> None:
    if isinstance(place[-1], str):
        path.write_text(to_toml(without(FULL, place)))
        assert isinstance(load_recipe(path), Recipe)
    for wrong in wrong_for(find(FULL, place)):
        if (place, wrong) in ((("scales",), {}), (("rounding",), {})):
            continue
        path.write_text(to_toml(replaced(FULL, place, wrong)))
        message = refused(path)
        assert str(place[0]) in message, (wrong, message)
        assert str(place[-1]) in message, (wrong, message)


@pytest.mark.parametrize("content", UNREADABLE[1:], ids=lambda content: repr(content[:8]))
def test_what_is_no_toml_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    assert "cannot read the recipe" in refused(path)


def test_a_truncated_file_is_a_shorter_recipe_or_an_error(path: Path) -> None:
    refusals = 0
    for content in truncated(FILES[-1].read_bytes()):
        path.write_bytes(content)
        with suppress(DeployError):
            assert isinstance(load_recipe(path), Recipe)
            continue
        refused(path)
        refusals += 1
    assert 0 < refusals < 12


def test_what_is_no_file_of_that_size_is_refused(path: Path, tmp_path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "is too large: 1099511627776 bytes" in refused(path)
    os.mkfifo(tmp_path / "pipe.toml")
    assert "is not a regular file" in refused(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    assert "Is a directory" in refused(tmp_path / "folder.toml")
    with pytest.raises(DeployError, match="no recipe nonsense") as raised:
        load_recipe("nonsense")
    assert "accurate, fast, thorough" in raised.value.hint
    with pytest.raises(DeployError, match="there is no recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(DeployError, match="File name too long"):
        load_recipe(tmp_path / f"{'n' * 300}.toml")
