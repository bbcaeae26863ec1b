"""Files that `torch.save` or `pickle.dump` has written, as trees of dicts, `StoredTensor`s and inert records."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from repvgg_deploy.checkpoints.archives import Archive
from repvgg_deploy.checkpoints.known_globals import StorageType, make_globals
from repvgg_deploy.checkpoints.sources import MemorySource, Source, open_stream, read_bytes
from repvgg_deploy.checkpoints.stored import Blob, Span, Storage
from repvgg_deploy.checkpoints.unpickling import Globals, PickleError, read_pickle

_MAGIC = 0x1950A86A20F9469CFC6C
"""The first of the pickles that torch wrote before version 1.6."""


@dataclass(frozen=True)
class Tree:
    """What a file holds; `unread` counts the classes and functions that its pickle names and that were not run."""

    value: Any
    unread: dict[str, int]


def read_torch_archive(archive: Archive, depth: int = 0) -> Tree:
    """The value in a zip file of `torch.save`."""
    root = find_root(archive.names)
    # Older releases of torch do not write this entry.
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive else b"little"
    blobs: dict[str, Blob] = {}

    def find_storage(identifier: Any) -> Any:
        kind, key, count = _parse_identifier(identifier)
        name = f"{root}data/{key}"
        if name not in blobs:
            if name not in archive:
                raise PickleError(f"the storage {key} is missing")
            blobs[name] = archive.blob(name)
        if count * kind.dtype.itemsize > blobs[name].nbytes:
            raise PickleError(f"the storage {key} is shorter than the pickle says")
        return Storage(blobs[name], kind.dtype, order == b"big")

    content = archive.read(f"{root}data.pkl")
    names = make_globals(_nested(depth), len(content))
    value = read_pickle(open_stream(MemorySource(content)), names, find_storage)
    return Tree(value, names.unread)


def read_pickles(source: Source, depth: int = 0) -> Tree:
    """The value in a file of `torch.save` before version 1.6, or in a plain pickle."""
    stream = open_stream(source)
    names = make_globals(_nested(depth), source.size)
    first = read_pickle(stream, names, _refuse_identifier)
    if first != _MAGIC:
        return Tree(first, names.unread)
    for _ in range(2):
        # The version, and what machine wrote the file.
        read_pickle(stream, names, _refuse_identifier)
    return Tree(_read_legacy(stream, source, names), names.unread)


def _read_legacy(stream: IO[bytes], source: Source, names: Globals) -> Any:
    storages: dict[str, _LegacyStorage] = {}

    def find_storage(identifier: Any) -> Any:
        if isinstance(identifier, tuple) and len(identifier) == 4 and identifier[0] == "module":
            # A class, and its source code.
            return identifier[1]
        kind, key, count = _parse_identifier(identifier)
        size = count * kind.dtype.itemsize
        if size > source.size:
            raise PickleError(f"the storage {key} is longer than the file")
        found = storages.setdefault(key, _LegacyStorage(kind.dtype.itemsize, Span(f"storage {key}", source, 0, size)))
        return Storage(found.blob, kind.dtype)

    value = read_pickle(stream, names, find_storage)
    keys = read_pickle(stream, names, _refuse_identifier)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("the list of storages is not a list")
    position = stream.tell()
    for key in keys:
        (count,) = struct.unpack("<q", read_bytes(source, position, 8))
        size = count * storages[key].item_size
        if size < 0 or position + 8 + size > source.size or size < storages[key].blob.nbytes:
            raise PickleError(f"the storage {key} is cut off")
        storages[key].blob.place_at(position + 8)
        position += 8 + size
    if len(set(keys)) != len(storages):
        raise PickleError("a storage is missing")
    return value


@dataclass(frozen=True)
class _LegacyStorage:
    item_size: int
    blob: Span


def _parse_identifier(identifier: Any) -> tuple[StorageType, str, int]:
    """The type, the key and the count of numbers of a storage; what torch adds to them is the device and views."""
    if not isinstance(identifier, tuple) or len(identifier) < 5:
        raise PickleError("a persistent id is not in torch's format")
    word, kind, key, _, count = identifier[:5]
    if word not in ("storage", b"storage") or not isinstance(kind, StorageType):
        raise PickleError("a persistent id is not that of a storage")
    # Not `isinstance`: True is an int as well.
    if not isinstance(key, str | int) or type(count) is not int or count < 0:
        raise PickleError("a storage has no name or no size")
    if len(identifier) > 5 and identifier[5] is not None:
        raise PickleError("a storage is a view of another one, as torch wrote them before version 0.4")
    return kind, str(key), count


def _refuse_identifier(_: Any) -> Any:
    raise PickleError("a plain pickle has no storages")


def _nested(depth: int) -> Callable[[bytes], Any]:
    """A reader of the storages that a plain pickle of tensors holds as files of `torch.save`."""

    def load(content: bytes) -> Any:
        if depth > 0:
            raise PickleError("files are nested in files")
        source = MemorySource(content)
        if content[:2] == b"PK":
            return read_torch_archive(Archive(source), depth + 1).value
        return read_pickles(source, depth + 1).value

    return load


def find_root(names: tuple[str, ...]) -> str:
    """The folder of the one `data.pkl` in an archive of `torch.save`, with a slash; or nothing.

    Raises:
        PickleError: there is none, or there are several.
    """
    roots = [name.removesuffix("data.pkl") for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise PickleError(f"it holds {len(roots)} checkpoints")
    return roots[0]
