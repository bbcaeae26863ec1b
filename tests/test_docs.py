"""The documents say what the program does."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from repvgg_deploy.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def commands_in(page: Path) -> list[str]:
    """The lines of indented or fenced blocks that call the tool."""
    lines = page.read_text(encoding="utf-8").splitlines()
    calls = [line.strip().removeprefix("$ ") for line in lines if re.match(r"^(    |\$ )?(\$ )?repvgg-deploy ", line)]
    return [call.split("#")[0].strip() for call in calls]


def test_the_command_page_is_what_help_prints() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", DOCS / "make_cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.make_page(), "run: python docs/make_cli.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_page_exists_with_its_options(page) -> None:
    for call in commands_in(page):
        _, name, *arguments = shlex.split(call)
        assert name in main.commands, call
        command = main.commands[name]
        known = {option for p in command.params if isinstance(p, click.Option) for option in p.opts + p.secondary_opts}
        for argument in arguments:
            if argument.startswith("--"):
                assert argument.split("=")[0] in known, call


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_shows_the_two_commands_that_do_everything() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"    make {target}" in readme
        assert f"\n{target}: " in makefile


def test_no_page_names_the_address_of_a_package_registry() -> None:
    names = ("Makefile", "Dockerfile", "pyproject.toml", "constraints.txt", "mkdocs.yml", "CITATION.cff")
    others = [path for folder in ("requirements", ".github") for path in (ROOT / folder).rglob("*") if path.is_file()]
    for page in [*PAGES, *(ROOT / name for name in names), *others]:
        assert not re.search(r"pypi\.org|download\.pytorch|pypi\.nvidia|files\.pythonhosted", page.read_text("utf-8"))
