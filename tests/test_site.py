"""The documentation's site: every page is in it, its figures are drawn by a script, and it explains every error."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TROUBLESHOOTING = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
# Made when the site is built, from files at the top of the repository.
MADE = {"contributing.md", "changelog.md"}


@cache
def load_script(name: str) -> ModuleType:
    """A module of docs/_site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "_site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Dataclasses look their module up.
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module


def pages_in(nav: Any) -> list[str]:
    """The pages of `nav` in mkdocs.yml, whatever they are called."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(part)]


def test_every_page_is_named_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(pages_in(nav)) == sorted(pages | MADE), "name each page of docs/ once under `nav` in mkdocs.yml"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_lists_and_tables_are_written_as_every_renderer_reads_them(page) -> None:
    """Python-Markdown nests a list at four spaces, and begins a list or a table only after an empty line."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    item = r"(?:[-*]|\d+\.) "
    assert re.findall(rf"^ {{1,3}}{item}.*", text, flags=re.M) == []
    assert re.findall(rf"^(?!{item})[^ #\n].*\n{item}.*", text, flags=re.M) == []
    assert re.findall(r"^(?!\|).+\n\|.*", text, flags=re.M) == []


@pytest.mark.slow
def test_every_figure_is_drawn_by_a_script_and_shown_in_a_page(tmp_path) -> None:
    mpl = pytest.importorskip("matplotlib")
    script = load_script("make_figures")
    with mpl.rc_context(script.STYLE):
        script.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    kept = {path.name for path in (DOCS / "figures").iterdir()}
    assert drawn <= kept, "run: python docs/_site/make_figures.py"
    # The others need a trained net and its images; the scripts that draw them name them.
    scripts = "".join(
        path.read_text(encoding="utf-8") for f in ("bench", "examples") for path in (ROOT / f).rglob("*.py")
    )
    assert {name for name in kept - drawn if Path(name).stem not in scripts} == set()
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    assert {name for name in kept if f"figures/{Path(name).stem}." not in pages} == set()


@pytest.mark.slow
def test_every_error_belongs_to_one_section_of_the_troubleshooting_page() -> None:
    script = load_script("raised_errors")
    sections = script.sections_of(TROUBLESHOOTING)
    explained = [error for section in sections for error in script.errors_of(section, TROUBLESHOOTING)]
    missing = {error.module for error in set(script.find_errors()) - set(explained)}
    assert not missing, "name these modules in a section of docs/troubleshooting.md"
    assert len(explained) == len(script.find_errors())


@pytest.mark.slow
def test_every_section_names_what_is_there_and_raises() -> None:
    script = load_script("raised_errors")
    for section in script.sections_of(TROUBLESHOOTING):
        assert script.errors_of(section, TROUBLESHOOTING), section
        for name in section:
            assert (script.PACKAGE / name).exists(), f"{name}, of docs/troubleshooting.md"


def test_every_section_gives_the_reason_before_its_list() -> None:
    for section in re.split(r"^## ", TROUBLESHOOTING, flags=re.M)[1:]:
        title, _, text = section.partition("\n")
        assert text.count("<!-- errors:") == 1, title
        assert len(text.partition("<!--")[0].split()) >= 20, f"{title}: say why, and what to do"


@pytest.mark.slow
def test_the_errors_are_read_as_they_are_raised() -> None:
    errors = load_script("raised_errors").find_errors()
    by_module = {error.module for error in errors}
    assert {"checkpoints/containers.py", "files/staging.py", "engine/sidecar.py"} <= by_module
    assert any(error.message == "… is empty" and error.kind == "CheckpointError" for error in errors)
