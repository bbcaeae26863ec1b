"""What a file is, and its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

FileKind = Literal["checkpoint", "engine", "onnx"]


def file_kind(path: Path) -> FileKind:
    """What a model file is: by its ending, or of an ONNX graph by its first byte (ModelProto.ir_version).

    A plan's first bytes are the library's own affair. Whatever is neither is taken for a checkpoint.
    """
    if path.suffix in (".plan", ".engine", ".trt"):
        return "engine"
    if path.suffix == ".onnx":
        return "onnx"
    try:
        # Opening a pipe may never end.
        if not path.is_file():
            return "checkpoint"
        with path.open("rb") as file:
            return "onnx" if file.read(1) == b"\x08" else "checkpoint"
    except OSError:
        return "checkpoint"


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; other threads run meanwhile."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
