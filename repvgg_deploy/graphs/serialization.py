"""An ONNX file read without its weights: a few kilobytes out of hundreds of megabytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx

from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import (
    GRAPH_INITIALIZER,
    LARGE,
    MODEL_GRAPH,
    TENSOR_RAW_DATA,
    encode_field,
    with_external_data,
)

# Wire types of protobuf, and those of fixed size in bytes.
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}


def read_skeleton(path: Path) -> onnx.ModelProto:
    """The model in an ONNX file, its large weights as external data that lie in the file itself.

    ONNX Runtime maps such weights into memory, where it would copy inline ones twice; see `OnnxRunner`.

    Raises:
        GraphError: there is no such file, or it is not an ONNX graph.
    """
    try:
        with path.open("rb") as file:
            model: onnx.ModelProto = onnx.ModelProto.FromString(_model(file, path))
            return model
    except FileNotFoundError as error:
        raise GraphError(f"there is no file {path}", "give the ONNX graph that `export` wrote") from error
    except OSError as error:
        raise GraphError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:
        # DecodeError of whichever protobuf implementation is installed, or one of the ValueErrors below.
        if not isinstance(error, ValueError) and type(error).__name__ != "DecodeError":
            raise
        raise GraphError(f"{path} is not an ONNX graph, or a damaged one", "export it again") from error


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """The `metadata_props` of an ONNX file, whatever its size.

    Raises:
        GraphError: see `read_skeleton`.
    """
    return {item.key: item.value for item in read_skeleton(path).metadata_props}


def _model(file: BinaryIO, path: Path) -> bytes:
    kept = bytearray()
    for number, start, end in _fields(file, path.stat().st_size):
        if number == MODEL_GRAPH:
            kept += _encode(MODEL_GRAPH, _graph(file, end, path.name))
        else:
            kept += _bytes(file, start, end)
    return bytes(kept)


def _graph(file: BinaryIO, end: int, name: str) -> bytes:
    kept = bytearray()
    for number, start, field_end in _fields(file, end):
        if number == GRAPH_INITIALIZER:
            kept += _encode(GRAPH_INITIALIZER, _weight(file, field_end, name))
        else:
            kept += _bytes(file, start, field_end)
    return bytes(kept)


def _weight(file: BinaryIO, end: int, name: str) -> bytes:
    kept, large = bytearray(), None
    for number, start, field_end in _fields(file, end):
        if number == TENSOR_RAW_DATA and field_end - file.tell() >= LARGE:
            large = (file.tell(), field_end - file.tell())
        else:
            kept += _bytes(file, start, field_end)
    if large is None:
        return bytes(kept)
    return with_external_data(bytes(kept), name, *large)


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each field up to `end`; the file stands at the field's content, and need not stay."""
    start = file.tell()
    while start < end:
        file.seek(start)
        tag = _read_varint(file)
        if tag & 7 == _LENGTH_DELIMITED:
            length = _read_varint(file)
            field_end = file.tell() + length
        elif tag & 7 == _VARINT:
            content = file.tell()
            _read_varint(file)
            field_end = file.tell()
            file.seek(content)
        elif tag & 7 in _FIXED:
            field_end = file.tell() + _FIXED[tag & 7]
        else:
            raise ValueError("no field of an ONNX graph has this wire type")
        if field_end > end:
            raise ValueError("a field extends past the end of its message")
        yield tag >> 3, start, field_end
        start = field_end


def _bytes(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _encode(number: int, content: bytes) -> bytes:
    return encode_field(number, len(content)) + content


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
