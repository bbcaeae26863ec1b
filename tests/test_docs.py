"""The documents say what the program does."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

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
    # In a process of its own: a command keeps the help option of its first call, which may be another test's.
    show = "import make_cli; print(make_cli.make_page(), end='')"
    paths = os.pathsep.join([str(DOCS), str(DOCS.parent)])
    made = subprocess.run(
        [sys.executable, "-c", show],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == made.stdout, "run: python docs/make_cli.py"


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


@pytest.mark.exhaustive
def test_the_quick_start_works_as_it_stands(tmp_path, monkeypatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Quick start")[2]
    lines = re.search(r"(?:^    .+\n)+", text, flags=re.M)[0].split("\n")[:-1]
    assert len(lines) == 5
    assert lines[0].strip().startswith("pip install '.[")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    for line in lines[1:]:
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"
    assert (tmp_path / "out" / "demo.fp16.onnx").exists()


def test_the_badges_are_true() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    badges = re.findall(r"^!\[([^\]]+)\]\(https://img\.shields\.io/badge/([^)]+)\)", readme, flags=re.M)
    versions = [c.rpartition(" ")[2] for c in project["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert dict(badges) == {
        f"Python {versions[0]} to {versions[-1]}": f"python-{versions[0]}%20%E2%80%93%20{versions[-1]}-blue",
        f"License: {project['project']['license']}": f"license-{project['project']['license']}-green",
        "Types: mypy strict": "types-mypy%20strict-blue",
    }
    assert project["tool"]["mypy"]["strict"]


def test_an_index_shows_the_readme_without_links_that_lead_nowhere() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/" in text
    for change in config["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"].replace("\\1", r"\g<1>"), text)
    assert set(re.findall(r"\]\((?!https:)[^)]*\)", text)) == set()
    assert "the tutorial" in text.replace("\n", " ").lower()


def test_the_image_s_requirements_are_hashed_and_agree_with_the_pins() -> None:
    lines = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    found = dict(re.match(r"([\w.-]+)==([^ ]+)", line).groups() for line in lines if line[0].isalpha())
    blocks = re.split(r"\n(?=\w)", "\n".join(lines[1:]))
    assert all("--hash=sha256:" in block for block in blocks)
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert {name: found[name] for name in found if name in pins} == {name: pins[name] for name in found if name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    names = {re.match(r"[\w.-]+", need)[0].lower() for need in needed} - {"torch"}
    assert names <= set(found), "run: make requirements"


def test_no_page_names_the_address_of_a_package_registry() -> None:
    names = ("Makefile", "Dockerfile", "pyproject.toml", "constraints.txt", "mkdocs.yml", "CITATION.cff")
    folders = ("requirements", ".github", "docker", "examples")
    others = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    for page in [*PAGES, *(ROOT / name for name in names), *others]:
        assert not re.search(r"pypi\.org|download\.pytorch|pypi\.nvidia|files\.pythonhosted", page.read_text("utf-8"))
