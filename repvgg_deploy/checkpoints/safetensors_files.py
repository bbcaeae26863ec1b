"""`.safetensors` files: a header in JSON that must describe every byte after it exactly once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from repvgg_deploy.checkpoints.number_types import NUMBER_TYPES, NumberType
from repvgg_deploy.checkpoints.sources import Source, read_bytes
from repvgg_deploy.checkpoints.stored import Span, Storage, StoredTensor, contiguous_stride
from repvgg_deploy.files.printable import printable

_MAX_HEADER = 100_000_000
"""The safetensors library has the same limit."""
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


class HeaderError(Exception):
    """A header that does not describe the file that it begins."""


def read_safetensors(source: Source) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors by name and the metadata of a `.safetensors` file.

    The format: 8 bytes with the header's length, the header, the tensors without a gap
    (https://github.com/huggingface/safetensors#format).

    Raises:
        HeaderError: the header is malformed, or tensors overlap, leave a gap, or do not match their shape's size.
    """
    length = int.from_bytes(read_bytes(source, 0, 8), "little")
    if length > min(_MAX_HEADER, source.size - 8):
        raise HeaderError("the header is longer than the file")
    try:
        header = json.loads(read_bytes(source, 8, length), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError("the header is not an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("the metadata are not text")
    spans = {name: _parse(name, value) for name, value in header.items()}
    end = 0
    # By begin and end: a tensor without values stands before the one that begins in its place.
    for name, (_, _, begin, behind) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise HeaderError(f"{printable(name)} overlaps another tensor, or leaves a gap")
        end = behind
    if 8 + length + end != source.size:
        raise HeaderError(f"the tensors have {end} bytes, the file has {source.size - 8 - length} for them")
    tensors = {}
    for name, (dtype, shape, begin, behind) in spans.items():
        blob = Span(printable(name), source, 8 + length + begin, behind - begin)
        tensors[name] = StoredTensor(shape, dtype, contiguous_stride(shape), 0, Storage(blob, dtype))
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _parse(name: str, value: Any) -> tuple[NumberType, tuple[int, ...], int, int]:
    shown = printable(name)
    if not isinstance(value, Mapping):
        raise HeaderError(f"{shown} is not described")
    kind, shape, span = _NAMES.get(str(value.get("dtype"))), value.get("shape"), value.get("data_offsets")
    if kind is None:
        raise HeaderError(f"{shown} has the type {printable(str(value.get('dtype')))}, which is not known")
    if not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        raise HeaderError(f"{shown} has no shape or no data offsets")
    if any(type(number) is not int or not 0 <= number < 1 << 60 for number in (*shape, *span)):
        raise HeaderError(f"{shown} has an impossible shape or impossible data offsets")
    dtype = NUMBER_TYPES[kind]
    if math.prod(shape) * dtype.itemsize != span[1] - span[0]:
        raise HeaderError(f"the number of bytes of {shown} does not match its shape")
    return dtype, tuple(shape), span[0], span[1]
