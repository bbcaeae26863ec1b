"""Paths that no file can be read from or written to, given to each option of each command that takes a path."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from random import Random

from fuzzing.cases import Case, Format
from fuzzing.checkpoints import whole_safetensors
from fuzzing.graphs import class_folders, whole_graph
from fuzzing.mutations import FORGED

_READ = (
    *("/dev/zero", "/dev/full", "/dev/null", "/dev/tty", "/proc/self/mem", "IN/fifo", "IN/folder"),
    *(
        "IN/missing",
        "IN/loop",
        "IN/dangling",
        "IN/empty",
        "IN/net.onnx/below",
        "",
        "IN/*",
        "IN/[",
        "~nobody/x",
    ),
    *(
        "IN/" + "x" * 256,
        "IN/" + "y/" * 3_000,
        "IN/a\0b",
        f"IN/a\nerror: {FORGED}",
        "IN/\x1b[31m\x07",
        "IN/\udcff\udcfe",
    ),
)
_WRITTEN = (
    *("OUT/folder", "OUT/missing/deeper/x", "OUT/loop", "OUT/file/below", "OUT/fifo", "/proc/self/x", "/dev/full/x"),
    *("OUT/" + "x" * 256, "OUT/" + "y/" * 3_000, "OUT/a\0b", f"OUT/a\nerror: {FORGED}", "OUT/\x1b[31m", "OUT/\udcff"),
)
_ENDINGS = ("", ".onnx", ".plan", ".pth", ".safetensors", ".toml", ".json", ".tar", ".jpg", ".html", ".csv", ".txt")
_EXPORT = ("export", "IN/net.safetensors", "-o", "OUT", "--engine", "none", "--size", "32")
_INT8 = (*_EXPORT, "--int8", "--calib", "IN/data")
_EVAL = ("eval", "IN/net.onnx", "--data", "IN/data")
_FEW = ("--duration", "0", "--warmup", "0", "--iterations", "1")

_READING: tuple[tuple[str, ...], ...] = (
    ("inspect", "@"), ("export", "@", "-o", "OUT", "--engine", "none"), ("fuse", "@", "-o", "OUT/x.pth"),
    ("verify", "@", "IN/net.onnx"), ("verify", "IN/net.onnx", "@"),
    ("verify", "IN/net.onnx", "IN/net.onnx", "--data", "@"),
    ("eval", "@", "--data", "IN/data"), ("eval", "IN/net.onnx", "--data", "@"), (*_EVAL, "--ground-truth", "@"),
    ("predict", "@", "IN/data"), ("predict", "IN/net.onnx", "@"), ("predict", "IN/net.onnx", "@", "-o", "OUT/x.csv"),
    ("bench", "@", *_FEW), ("bench", "--suite", "@", "-o", "OUT/x.json"),
    ("bench", "--config", "@", "IN/net.onnx", *_FEW),
    ("bench", "IN/net.onnx", "--input", "jpeg", "@"), ("report", "@", "-o", "OUT/x.html"),
    ("package", "@", "-o", "OUT", "--triton"), ("package", "IN/net.onnx", "-o", "OUT", "--triton", "--data", "@"),
    ("refit", "@", "IN/net.safetensors"), ("refit", "IN/net.plan", "@"),
    ("qat", "@", "--data", "IN/data", "--calib", "IN/data", "-o", "OUT"),
    ("qat", "IN/net.safetensors", "--data", "@", "--calib", "IN/data", "-o", "OUT"),
    (*_EXPORT, "--labels", "@"), (*_EXPORT, "--config", "@"), (*_EXPORT, "--verify-data", "@"),
    (*_EXPORT, "--int8", "--calib", "@"), (*_INT8, "--recipe", "@"),
    (*_INT8, "--max-drop", "1", "--val", "@"),
)  # fmt: skip
_WRITING: tuple[tuple[str, ...], ...] = (
    ("export", "IN/net.safetensors", "--engine", "none", "--size", "32", "-o", "@"), (*_EXPORT, "--save-config", "@"),
    (*_INT8, "--calib-cache", "@"),
    ("fuse", "IN/net.safetensors", "-o", "@"), ("predict", "IN/net.onnx", "IN/data", "-o", "@"),
    ("bench", "IN/net.onnx", *_FEW, "-o", "@"), ("package", "IN/net.onnx", "--triton", "-o", "@"),
    ("report", "IN/result.json", "-o", "@"), ("report", "IN/result.json", "-o", "OUT/x.html", "--plots", "@"),
)  # fmt: skip


@cache
def _files() -> Mapping[str, bytes]:
    return {**class_folders(), "net.onnx": whole_graph(), "net.safetensors": whole_safetensors(), "net.plan": b"plan",
            "empty": b"", "folder/x": b"x", "result.json": b"{}"}  # fmt: skip


def _make(rng: Random) -> Case:
    writes = rng.random() < 0.25
    command = rng.choice(_WRITING if writes else _READING)
    path = rng.choice(_WRITTEN if writes else _READ)
    if path and rng.random() < 0.5:
        path += rng.choice(_ENDINGS)
    arguments = tuple(path if argument == "@" else argument for argument in command)
    places = {"out/folder": "folder", "out/loop": "loop", "out/fifo": "fifo", "out/file": "file", "in/fifo": "fifo",
              "in/loop": "loop", "in/dangling": "dangling"}  # fmt: skip
    places |= {place + path[len(place) :]: kind for place, kind in places.items() if _is_with_ending(place, path)}
    as_json = ("--json",) if rng.random() < 0.3 and "predict" not in arguments else ()
    return Case((*arguments, *as_json), _files(), f"{path[:60]!r}", places=places)


def _is_with_ending(place: str, path: str) -> bool:
    """Whether `path` is `place` with an ending, so that the pipe or folder must have it too."""
    start = place.replace("in/", "IN/").replace("out/", "OUT/")
    return path.startswith(f"{start}.") and path[len(start) :] in _ENDINGS


FORMATS = (Format("paths", _make, 3),)
