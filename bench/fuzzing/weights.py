"""Safetensors and NumPy files with headers that contradict what they describe."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
from torch import Tensor

from fuzzing.mutations import NAMES, choose_integer, mutate_bytes, mutate_text, mutate_tree, write_json
from fuzzing.zips import make_entry, read_zip, write_zip

_TYPES = ("F32", "F16", "F64", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", "", 3, None)


def mutate_safetensors(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A safetensors file with another header, other lengths or other data."""
    length = int.from_bytes(content[:8], "little")
    raw, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.choice(("tree", "tree", "tensor", "tensor", "tensor", "text", "length", "data", "bytes", "name"))
    if kind == "bytes":
        changed, name = mutate_bytes(content, rng)
        return changed, f"bytes: {name}"
    if kind == "length":
        wrong = choose_integer(rng, length) % 2**64
        return wrong.to_bytes(8, "little") + raw + data, kind
    if kind == "data":
        data, name = mutate_bytes(data, rng)
        return _join(raw, data), f"data: {name}"
    if kind == "text":
        raw, name = mutate_text(raw, rng)
        return _join(raw, data), f"header: {name}"
    header: dict[str, Any] = json.loads(raw)
    name = kind
    if kind == "tree":
        header, name = mutate_tree(header, rng)
    elif kind == "name":
        key = rng.choice(sorted(header))
        header[rng.choice(NAMES)] = header.pop(key)
    else:
        name = _change_tensor(header, rng)
    return _join(write_json(header, rng), data), name


def _change_tensor(header: dict[str, Any], rng: Random) -> str:
    names = [key for key in sorted(header) if key != "__metadata__"]
    tensor = header[rng.choice(names)]
    what = rng.choice(("dtype", "shape", "shape", "offsets", "exchange", "alias"))
    other = header[rng.choice(names)]
    if what == "dtype":
        tensor["dtype"] = rng.choice(_TYPES)
    elif what == "shape":
        shape = tensor["shape"]
        place = rng.randrange(len(shape) + 1)
        shape[place : place + 1] = rng.choice(([choose_integer(rng)], [0], [1, 1], [], [2**31, 0], shape * 3))
    elif what == "offsets":
        tensor["data_offsets"][rng.randrange(2)] = choose_integer(rng, tensor["data_offsets"][0])
    elif what == "exchange":
        tensor["data_offsets"], other["data_offsets"] = other["data_offsets"], tensor["data_offsets"]
    else:
        tensor["data_offsets"] = list(other["data_offsets"])
    return what


def _join(raw: bytes, data: bytes) -> bytes:
    return len(raw).to_bytes(8, "little") + raw + data


def write_npz(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a `.npz` file."""
    stream = io.BytesIO()
    np.savez(stream, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    return stream.getvalue()


def mutate_npz(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A `.npz` file of which one array has another header."""
    archive = read_zip(content)
    entries = list(archive.entries)
    place = rng.randrange(len(entries))
    data, name = mutate_npy(entries[place].data, rng)
    entries[place] = make_entry(entries[place].local.name, data)
    return write_zip(type(archive)(tuple(entries))), name


def mutate_npy(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A `.npy` file with another header."""
    if rng.random() < 0.3:
        changed, name = mutate_bytes(content, rng)
        return changed, f"npy bytes: {name}"
    length = int.from_bytes(content[8:10], "little")
    header = {"descr": "<f4", "fortran_order": False, "shape": (4,)}
    with suppress(SyntaxError, ValueError):
        header = ast.literal_eval(content[10 : 10 + length].decode("latin-1"))
    what = rng.choice(("descr", "shape", "fortran_order", "literal", "version"))
    text = repr(header)
    version = b"\1\0"
    if what == "descr":
        types = ("|O", "<f8", ">f4", "<f2", "<U999999999", "|V2147483647", "|S1", "<M8[ns]", "<c8", "", "f4,f4", "<i8")
        text = repr({**header, what: rng.choice(types)})
    elif what == "shape":
        shape = list(header["shape"]) or [1]  # type: ignore[call-overload]
        shape[rng.randrange(len(shape))] = rng.choice((choose_integer(rng), 0, -1))
        text = repr({**header, what: tuple(shape)})
    elif what == "fortran_order":
        text = repr({**header, what: rng.choice((True, 1, None, "x"))})
    elif what == "literal":
        text = rng.choice(("(" * 5_000, "[" * 200, "{}", "1", "__import__('os').system('touch canary')", "9" * 9_000))
    else:
        version = rng.choice((b"\2\0", b"\3\0", b"\0\0", b"\xff\xff"))
    raw = text.encode("latin-1", "replace") + b"\n"
    size = len(raw).to_bytes(2, "little") if version == b"\1\0" else len(raw).to_bytes(4, "little")
    return content[:6] + version + size + raw + content[10 + length :], f"npy {what}"
