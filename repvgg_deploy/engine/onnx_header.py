"""The metadata of an ONNX file, read without its graph: a few kilobytes out of hundreds of megabytes."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx

from repvgg_deploy.errors import GraphError

# Field numbers of ModelProto (onnx.proto): the graph is skipped, the rest is kept.
_GRAPH = 7
_LENGTH_DELIMITED = 2


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """The `metadata_props` of an ONNX file, whatever its size.

    Raises:
        GraphError: there is no such file, or it is no ONNX graph.
    """
    try:
        with path.open("rb") as file:
            model = onnx.ModelProto.FromString(_without_graph(file, path.stat().st_size))
    except FileNotFoundError as error:
        raise GraphError(f"there is no file {path}", "give the ONNX graph that `export` wrote") from error
    except OSError as error:
        raise GraphError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:
        # DecodeError of whichever protobuf implementation is installed, or one of the ValueErrors below.
        if not isinstance(error, ValueError) and type(error).__name__ != "DecodeError":
            raise
        raise GraphError(f"{path} is no ONNX graph, or a damaged one", "export it again") from error
    return {item.key: item.value for item in model.metadata_props}


def _without_graph(file: BinaryIO, size: int) -> bytes:
    kept = bytearray()
    while file.tell() < size:
        start = file.tell()
        tag = _read_varint(file)
        if tag & 7 == _LENGTH_DELIMITED:
            length = _read_varint(file)
            if file.tell() + length > size:
                raise ValueError("a field ends behind the file")
            file.seek(length, 1)
        elif tag & 7 == 0:
            _read_varint(file)
        else:
            raise ValueError("no field of a ModelProto has this wire type")
        if tag >> 3 != _GRAPH:
            end = file.tell()
            file.seek(start)
            kept += file.read(end - start)
    return bytes(kept)


def _read_varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = file.read(1)
        if not byte or shift > 63:
            raise ValueError("a number is cut short")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7
