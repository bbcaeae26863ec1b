"""What ONNX Runtime raises where a graph cannot be loaded or run."""

from __future__ import annotations

from pathlib import Path

from repvgg_deploy.errors import GraphError


def is_graph_failure(error: Exception) -> bool:
    """Whether ONNX Runtime says with it that a graph cannot be loaded or run.

    Its exceptions have no common base class except Exception. Those of C++ libraries inside it become Python's own, and
    its messages, which quote the graph's names, are decoded as UTF-8, whatever they are.
    """
    own = type(error).__module__.split(".")[0] == "onnxruntime"
    return own or isinstance(error, MemoryError | RuntimeError | ValueError | OverflowError)


def require_readable(path: Path) -> None:
    """Raise GraphError if ONNX Runtime cannot be given `path`: it takes names in UTF-8 alone.

    Raises:
        GraphError: a folder or the file itself has another name.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise GraphError(f"ONNX Runtime opens no file whose path is not UTF-8: {path}", "rename it") from error


def first_line(error: Exception) -> str:
    """What an exception says, in a line; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
