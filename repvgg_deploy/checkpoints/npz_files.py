"""`.npz` files: a zip archive of named arrays, each in numpy's own format."""

from __future__ import annotations

import io
import re
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.lib import format as npy

from repvgg_deploy.checkpoints.archives import Archive
from repvgg_deploy.checkpoints.known_globals import array_tensor
from repvgg_deploy.checkpoints.sources import EndsEarlyError
from repvgg_deploy.checkpoints.stored import StoredTensor
from repvgg_deploy.files.printable import printable

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
        name.removesuffix(".npy").replace("/", "."): read_array(archive, name)
        for name in archive.names
        if name.endswith(".npy")
    }


def read_array(archive: Archive, name: str) -> StoredTensor:
    """The entry `name` of an archive, an array of numbers.

    Raises:
        ArrayError: it is something else, or damaged.
    """
    content, start, (shape, is_fortran, dtype) = _read_header(archive, name)
    if _NUMBERS.fullmatch(dtype.name) is None:
        raise ArrayError(f"{printable(name)} is an array of {printable(str(dtype))}, not of numbers")
    return array_tensor(len(content) - start, lambda: content[start:], dtype, shape, is_fortran)


def read_text(archive: Archive, name: str) -> str:
    """The entry `name` of an archive, an array that is one string.

    Raises:
        ArrayError: it is something else, or damaged.
    """
    content, start, (shape, _, dtype) = _read_header(archive, name)
    if dtype.kind != "U" or shape != () or len(content) - start != dtype.itemsize:
        raise ArrayError(f"{printable(name)} is not a string")
    try:
        return str(np.frombuffer(content[start:], dtype)[0]) if dtype.itemsize else ""
    except ValueError as error:
        raise ArrayError(f"{printable(name)} has characters that do not exist") from error


_Header = tuple[tuple[int, ...], bool, np.dtype[Any]]


def _read_header(archive: Archive, name: str) -> tuple[bytes, int, _Header]:
    """The bytes of an entry, where its values begin, and their shape, order and type."""
    shown = printable(name)
    try:
        content = archive.read(name)
    except KeyError as error:
        raise ArrayError(f"{shown} is missing") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, EndsEarlyError) as error:
        raise ArrayError(f"{shown} is damaged: {printable(str(error))}") from error
    stream = io.BytesIO(content)
    try:
        version = npy.read_magic(stream)
        # Version 3 is for names of fields that are not Latin-1, and arrays of numbers have no fields.
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ArrayError(f"{shown} has the version {version} of the format")
        header: _Header = read(stream, max_header_size=_MAX_HEADER)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        # The header is a literal of Python, whose parser raises the last three.
        raise ArrayError(f"{shown} is damaged: {printable(str(error))}") from error
    return content, stream.tell(), header
