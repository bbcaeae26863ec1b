"""Where tests stand: beside nothing but the package's own tree, and none leans on another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "repvgg_deploy"
MODULES = sorted(TESTS.rglob("test_*.py"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_PARAMETERS = 60, 6
# Its signature is a contract of the command line's page, and so are the names of its options.
LONG_SIGNATURES = {"export_module"}
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


def test_few_modules_lie_at_the_top_of_the_package() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10


def body_lines(function: ast.FunctionDef) -> int:
    """The lines of a function behind its signature and docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = first.end_lineno if is_docstring else first.lineno - 1
    return (function.end_lineno or 0) - (start or 0)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_fit_a_screen_and_take_few_arguments(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        arguments = function.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        assert body_lines(function) <= MOST_LINES, f"{function.name} has {body_lines(function)} lines"
        taken = [name for name in names if name not in ("self", "cls")]
        assert len(taken) <= MOST_PARAMETERS or function.name in LONG_SIGNATURES, f"{function.name} takes {taken}"
