"""Where tests stand: beside nothing but the package's own tree, and none leans on another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "repvgg_deploy"
MODULES = sorted(TESTS.rglob("test_*.py"))
# Tests of the benchmark scripts, and those that need a GPU whatever package they are of.
OTHER_FOLDERS = {"bench", "docker", "examples", "gpu"}


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_imports_another(path: Path) -> None:
    assert not [name for name in imported_modules(path) if name.rpartition(".")[2].startswith(("test_", "conftest"))]


def test_folders_of_tests_are_packages_of_the_code() -> None:
    folders = {path.parent.relative_to(TESTS) for path in MODULES}
    missing = [folder for folder in folders if not (PACKAGE / folder).is_dir() and folder.parts[0] not in OTHER_FOLDERS]
    assert not missing
