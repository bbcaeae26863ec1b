"""An ONNX file as its protobuf, held to what every reader of it relies on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from repvgg_deploy.errors import GraphError

_MAKE_AGAIN = "export it again"


def read_graph(path: Path) -> onnx.ModelProto:
    """The model in an ONNX file, without what it keeps in other files.

    Raises:
        GraphError: it cannot be read, is damaged, has no nodes, or has a name that is not UTF-8.
    """
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(path.read_bytes())
        is_text = _is_text(model)
    except (DecodeError, UnicodeDecodeError) as error:
        raise GraphError(f"{path} is a truncated or damaged ONNX graph", _MAKE_AGAIN) from error
    except OSError as error:
        raise GraphError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    if not is_text:
        raise GraphError(f"{path} has names that are not UTF-8", _MAKE_AGAIN)
    if not model.graph.node:
        raise GraphError(f"{path} is not an ONNX graph, or a truncated one: it has no nodes", _MAKE_AGAIN)
    return model


def _is_text(message: Any) -> bool:
    """Whether all text in a message is: protobuf gives bytes in its place where it is not UTF-8."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        items = value if isinstance(value, str | bytes) or not hasattr(value, "__len__") else list(value)
        for item in items if isinstance(items, list) else [items]:
            if isinstance(item, bytes) or (field.type == field.TYPE_MESSAGE and not _is_text(item)):
                return False
    return True
