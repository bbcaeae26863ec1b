"""The errors that a user can meet, read from the source: every place that makes a `DeployError` or one of its kinds."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).resolve().parents[2] / "repvgg_deploy"


@dataclass(frozen=True)
class RaisedError:
    """An error as it stands in the source; what is filled in when it is raised is an ellipsis."""

    module: str
    kind: str
    message: str
    hint: str


@cache
def find_errors() -> tuple[RaisedError, ...]:
    """Every error of the package, module by module, in the order of the source."""
    kinds = _find_kinds()
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = _find_constants(tree)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in kinds:
                given = [*call.args, *(k.value for k in call.keywords if k.arg in ("message", "hint"))]
                texts = [_read_text(node, constants) for node in given]
                found.append(RaisedError(module, name, *[*texts, "", ""][:2]))
    return tuple(found)


def sections_of(page: str) -> list[list[str]]:
    """The marks of a page, each with what it names: modules, and folders, which end with a slash."""
    return [mark.split() for mark in re.findall(r"<!-- errors: ([\w/. ]+) -->", page)]


def errors_of(section: Sequence[str], page: str) -> list[RaisedError]:
    """The errors that a mark stands for: a folder's are those of its modules that no other mark of the page names."""
    named = {name for names in sections_of(page) for name in names}
    found = []
    for error in find_errors():
        # The nearest of what is named: the module itself, or a folder around it.
        around = [error.module, *(f"{parent.as_posix()}/" for parent in PurePosixPath(error.module).parents)]
        nearest = next((name for name in around if name in named), None)
        if nearest in section:
            found.append(error)
    return found


def _find_kinds() -> set[str]:
    """`DeployError` and every class of errors.py that is one."""
    tree = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _find_constants(tree: ast.Module) -> dict[str, ast.expr]:
    """What stands for a name of the module that is given its value once."""
    found = [(node.targets[0], node.value) for node in tree.body if isinstance(node, ast.Assign)]
    return {target.id: value for target, value in found if isinstance(target, ast.Name)}


def _read_text(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_read_text(value, constants) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _read_text(node.left, constants) + _read_text(node.right, constants)
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Constant | ast.JoinedStr | ast.BinOp):
        return _read_text(constants[node.id], constants)
    return "…"
