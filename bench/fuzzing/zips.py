"""Zip archives written field by field, so that each field can contradict the others."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

from fuzzing.mutations import NAMES, choose_integer, mutate_bytes

_LOCAL, _CENTRAL, _END = "<4s5H3I2H", "<4s6H3I5H2I", "<4s4H2IH"
_BOMB = 600 << 20


@dataclass(frozen=True)
class Header:
    """The fields that the local header and the directory both have."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    unpacked: int
    extra: bytes = b""


@dataclass(frozen=True)
class Entry:
    """An entry: its bytes as they are stored, and what the two headers say of them; `shift` moves its offset."""

    data: bytes
    local: Header
    central: Header
    shift: int = 0


@dataclass(frozen=True)
class Zip:
    """An archive; `end` overrides fields of the end record by their place in it."""

    entries: tuple[Entry, ...]
    end: dict[int, int] = field(default_factory=dict)
    comment: bytes = b""


def read_zip(content: bytes) -> Zip:
    """The entries of a whole archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return Zip(tuple(make_entry(info.filename.encode(), archive.read(info)) for info in archive.infolist()))


def make_entry(name: bytes, data: bytes, method: int = 0) -> Entry:
    """A whole entry, stored or deflated."""
    stored = data
    if method == 8:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        stored = packer.compress(data) + packer.flush()
    header = Header(name, 0x800, method, zlib.crc32(data), len(stored), len(data))
    return Entry(stored, header, header)


def write_zip(archive: Zip) -> bytes:
    """The bytes of an archive, with all that it says wrongly."""
    body, directory = bytearray(), bytearray()
    for entry in archive.entries:
        offset = (len(body) + entry.shift) % (1 << 32)
        one, two = entry.local, entry.central
        body += struct.pack(_LOCAL, b"PK\3\4", 20, one.flags, one.method, 0, 33, *_numbers(one), len(one.name),
                            len(one.extra))  # fmt: skip
        body += one.name + one.extra + entry.data
        directory += struct.pack(_CENTRAL, b"PK\1\2", 20, 20, two.flags, two.method, 0, 33, *_numbers(two),
                                 len(two.name), len(two.extra), 0, 0, 0, 0, offset)  # fmt: skip
        directory += two.name + two.extra
    count = len(archive.entries)
    fields = [0, 0, count, count, len(directory), len(body), len(archive.comment)]
    widths = (16, 16, 16, 16, 32, 32, 16)
    fields = [archive.end.get(place, value) % (1 << widths[place]) for place, value in enumerate(fields)]
    return bytes(body + directory + struct.pack(_END, b"PK\5\6", *fields) + archive.comment)


def _numbers(header: Header) -> tuple[int, int, int]:
    return header.crc % 2**32, header.packed % 2**32, header.unpacked % 2**32


def mutate_zip(archive: Zip, rng: Random) -> tuple[Zip, str]:
    """An archive with one contradiction or oddity, and its name."""
    name = rng.choice(sorted(_MUTATIONS))
    return _MUTATIONS[name](archive, rng), name


def _with(archive: Zip, change: Callable[[Entry], Entry], rng: Random) -> Zip:
    entries = list(archive.entries)
    place = rng.randrange(len(entries))
    entries[place] = change(entries[place])
    return replace(archive, entries=tuple(entries))


def _field(entry: Entry, rng: Random) -> Entry:
    side = rng.choice(("local", "central"))
    header: Header = getattr(entry, side)
    name = rng.choice(("flags", "method", "crc", "packed", "unpacked"))
    value = choose_integer(rng, getattr(header, name))
    if name == "flags":
        value = 1 << rng.randrange(16)
    if name == "method":
        value = rng.choice((1, 6, 8, 9, 12, 14, 93, 95, 99, 65535))
    value %= 1 << (16 if name in ("flags", "method") else 32)
    changed = _replace_number(header, name, value)
    return replace(entry, local=changed) if side == "local" else replace(entry, central=changed)


def _replace_number(header: Header, name: str, value: int) -> Header:
    changes: dict[str, Any] = {name: value}
    return replace(header, **changes)


def _both(entry: Entry, rng: Random) -> Entry:
    name = rng.choice(("method", "packed", "unpacked"))
    value = rng.choice((8, 9, 12, 14)) if name == "method" else choose_integer(rng, entry.local.unpacked) % 2**32
    local, central = (_replace_number(header, name, value) for header in (entry.local, entry.central))
    return replace(entry, local=local, central=central)


def _damage(entry: Entry, rng: Random) -> Entry:
    data = bytearray(entry.data)
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return replace(entry, data=bytes(data))


def _damage_with_crc(entry: Entry, rng: Random) -> Entry:
    return make_entry(entry.local.name, _damage(entry, rng).data)


def _rename(entry: Entry, rng: Random) -> Entry:
    name = rng.choice(NAMES).encode("utf-8", "surrogatepass")[:60_000]
    if rng.random() < 0.3:
        name = entry.local.name.replace(b"data", name[:100])
    if rng.random() < 0.2:
        name += b"\xff\xfe"
    side = rng.choice((0, 1, 2, 2))
    local = entry.local if side == 0 else replace(entry.local, name=name)
    central = entry.central if side == 1 else replace(entry.central, name=name)
    return replace(entry, local=local, central=central)


def _zip64(entry: Entry, rng: Random) -> Entry:
    numbers = [choose_integer(rng, len(entry.data)) % 2**64 for _ in range(rng.randrange(4))]
    extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)
    central = replace(entry.central, packed=2**32 - 1, unpacked=2**32 - 1, extra=extra)
    return replace(entry, central=central)


def _deflate(entry: Entry, _: Random) -> Entry:
    return make_entry(entry.local.name, entry.data, 8) if entry.local.method == 0 else entry


@cache
def _bomb() -> Entry:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = bytes(1 << 20)
    data = b"".join(packer.compress(block) for _ in range(_BOMB >> 20)) + packer.flush()
    header = Header(b"bomb", 0x800, 8, 0, len(data), _BOMB)
    return Entry(data, header, header)


def _explode(entry: Entry, rng: Random) -> Entry:
    bomb = _bomb()
    # Either it admits what it unpacks to, or it says what the entry before had.
    size = rng.choice((_BOMB, entry.local.unpacked, 2**32 - 1))
    header = replace(bomb.local, name=entry.local.name, unpacked=size)
    return Entry(bomb.data, header, header)


def _shuffle(archive: Zip, rng: Random) -> Zip:
    entries = list(archive.entries)
    rng.shuffle(entries)
    return replace(archive, entries=tuple(entries))


def _double(archive: Zip, rng: Random) -> Zip:
    entry = rng.choice(archive.entries)
    return replace(archive, entries=(*archive.entries, *[entry] * rng.choice((1, 1, 5_000))))


def _remove(archive: Zip, rng: Random) -> Zip:
    entries = list(archive.entries)
    del entries[rng.randrange(len(entries))]
    return replace(archive, entries=tuple(entries))


def _swap(archive: Zip, rng: Random) -> Zip:
    """Two entries under each other's names: the file is whole, and says something else."""
    entries = list(archive.entries)
    one, two = rng.randrange(len(entries)), rng.randrange(len(entries))
    first, second = entries[one], entries[two]
    entries[one] = make_entry(first.local.name, second.data)
    entries[two] = make_entry(second.local.name, first.data)
    return replace(archive, entries=tuple(entries))


def _overlap(archive: Zip, rng: Random) -> Zip:
    shift = rng.choice((-1, 1, -30, 4, -100, -5_000, 2**31, rng.randrange(-500, 500)))
    return _with(archive, lambda entry: replace(entry, shift=shift), rng)


def _end(archive: Zip, rng: Random) -> Zip:
    place = rng.randrange(7)
    return replace(archive, end={place: choose_integer(rng, len(archive.entries)) % 2**32})


def _add(archive: Zip, rng: Random) -> Zip:
    name = rng.choice((b"data.pkl", b"x/data.pkl", b"constants.pkl", b"x/version", b"byteorder", b"a.npy", b"b.pth"))
    entry = make_entry(name, mutate_bytes(rng.choice(archive.entries).data, rng)[0])
    return replace(archive, entries=(*archive.entries, entry))


_MUTATIONS: dict[str, Callable[[Zip, Random], Zip]] = {
    "field of one header": lambda a, rng: _with(a, lambda e: _field(e, rng), rng),
    "field of both headers": lambda a, rng: _with(a, lambda e: _both(e, rng), rng),
    "damaged data": lambda a, rng: _with(a, lambda e: _damage(e, rng), rng),
    "damaged data with its CRC": lambda a, rng: _with(a, lambda e: _damage_with_crc(e, rng), rng),
    "name": lambda a, rng: _with(a, lambda e: _rename(e, rng), rng),
    "zip64": lambda a, rng: _with(a, lambda e: _zip64(e, rng), rng),
    "deflated": lambda a, rng: _with(a, lambda e: _deflate(e, rng), rng),
    "bomb": lambda a, rng: _with(a, lambda e: _explode(e, rng), rng),
    "order": _shuffle,
    "doubled entry": _double,
    "removed entry": _remove,
    "swapped entries": _swap,
    "overlap": _overlap,
    "end record": _end,
    "added entry": _add,
    "comment": lambda a, rng: replace(a, comment=rng.choice((b"x", b"PK\5\6" + bytes(18), bytes(65_000)))),
}
