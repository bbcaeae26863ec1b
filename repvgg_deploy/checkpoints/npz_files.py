"""`.npz` files: a zip archive of named arrays, each in numpy's own format."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from numpy.lib import format as npy

from repvgg_deploy.checkpoints.archives import Archive
from repvgg_deploy.checkpoints.inert import printable
from repvgg_deploy.checkpoints.known_globals import array_tensor
from repvgg_deploy.checkpoints.stored import StoredTensor

# numpy's own limit: it parses the header as a Python literal, which is not safe for very long text.
_MAX_HEADER = 10_000
_NUMBERS = re.compile(r"float(16|32|64)|u?int(8|16|32|64)|bool|complex(64|128)")


class ArrayError(Exception):
    """A member of an archive that is not an array of numbers."""


def read_npz(archive: Archive) -> dict[str, StoredTensor]:
    """The arrays of a `.npz` file by name; none is unpickled.

    Raises:
        ArrayError: a member is not an array of numbers.
    """
    return {
        name.removesuffix(".npy").replace("/", "."): _read_array(name, archive.read(name))
        for name in archive.names
        if name.endswith(".npy")
    }


def _read_array(name: str, content: bytes) -> StoredTensor:
    stream = io.BytesIO(content)
    shown = printable(name)
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ArrayError(f"{shown} has the version {version} of the format")
        header: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(stream, max_header_size=_MAX_HEADER)
    except ValueError as error:
        raise ArrayError(f"{shown} is damaged: {printable(str(error))}") from error
    shape, is_fortran, dtype = header
    if _NUMBERS.fullmatch(dtype.name) is None:
        raise ArrayError(f"{shown} is an array of {printable(str(dtype))}, not of numbers")
    start = stream.tell()
    return array_tensor(len(content) - start, lambda: content[start:], dtype, shape, is_fortran)
