"""Zip archives: a directory that is held against the entries it describes, and entries with their checksums."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Final

from repvgg_deploy.checkpoints.sources import EndsEarlyError, Source, open_stream, read_bytes
from repvgg_deploy.checkpoints.stored import AGAIN, Blob, Deferred, Span
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable

# The local file header: signature, version, flags, method, time, date, CRC-32, sizes, lengths of name and extra field.
_LOCAL: Final = struct.Struct("<4s5H3I2H")
# Bits of the general purpose flag (APPNOTE.TXT, 4.4.4): encrypted; sizes and CRC follow the data; the name is UTF-8.
_ENCRYPTED, _SIZES_BEHIND, _UTF8 = 0x1, 0x8, 0x800
_MAX_EXPANSION = 20
_EXPANSION_FREE_BYTES = 256 << 20
"""Compressed entries may hold this much, and 20 times the file's size beyond it: weights hardly shrink at all."""


class ArchiveError(Exception):
    """A zip file that contradicts itself."""


@dataclass(frozen=True)
class _Entry:
    info: zipfile.ZipInfo
    start: int


class Archive:
    """A zip file whose entries are stored or deflated, do not overlap, and are what its directory says."""

    def __init__(self, source: Source) -> None:
        """Read the directory of `source`.

        Raises:
            ArchiveError, zipfile.BadZipFile, …: the file is damaged.
        """
        self._source = source
        self._zip = zipfile.ZipFile(open_stream(source))
        infos = self._zip.infolist()
        self._entries = {info.filename: entry for info, entry in zip(infos, self._check(infos), strict=True)}
        if len(self._entries) != len(infos):
            raise ArchiveError("two entries have the same name")
        unpacked = sum(info.file_size for info in infos if info.compress_type != zipfile.ZIP_STORED)
        if unpacked > _EXPANSION_FREE_BYTES + _MAX_EXPANSION * source.size:
            raise ArchiveError(f"its {source.size} bytes claim to unpack to {unpacked}")
        # What torch writes where its user has switched checksums off.
        self.has_checksums = not infos or any(info.CRC for info in infos if info.file_size)

    @property
    def names(self) -> tuple[str, ...]:
        """The entries' names, in the directory's order."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def read(self, name: str) -> bytes:
        """An entry's bytes, unpacked; the checksum has been compared.

        Raises:
            CheckpointError: they are damaged.
        """
        if self.has_checksums:
            return self._unpack(name)
        return self.blob(name).load().tobytes()

    def blob(self, name: str) -> Blob:
        """An entry's bytes, read when they are requested."""
        entry = self._entries[name]
        info = entry.info
        if info.compress_type == zipfile.ZIP_STORED:
            crc = info.CRC if self.has_checksums else None
            return Span(f"{printable(name)} in the file", self._source, entry.start, info.file_size, crc)
        return Deferred(info.file_size, lambda: self._unpack(name))

    def _unpack(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, EndsEarlyError, NotImplementedError, ValueError) as error:
            reason = printable(str(error) or type(error).__name__)
            raise CheckpointError(f"{printable(name)} in the file is damaged ({reason})", AGAIN) from error

    def _check(self, infos: list[zipfile.ZipInfo]) -> list[_Entry]:
        """Where each entry's data begins; raise ArchiveError if the entries are not what the directory says."""
        starts = [self._check_entry(info) for info in infos]
        ends = [start + info.compress_size for info, start in zip(infos, starts, strict=True)]
        # Stored entries that share bytes would hold more than the file does, and count nothing in what is unpacked.
        spans = sorted(zip((info.header_offset for info in infos), ends, strict=True))
        limits = [begin for begin, _ in spans[1:]] + [self._zip.start_dir]
        if any(end > limit for (_, end), limit in zip(spans, limits, strict=True)):
            raise ArchiveError("two of its entries overlap")
        return [_Entry(info, start) for info, start in zip(infos, starts, strict=True)]

    def _check_entry(self, info: zipfile.ZipInfo) -> int:
        shown = printable(info.filename)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"{shown} uses an unsupported compression method")
        if info.flag_bits & _ENCRYPTED:
            raise ArchiveError(f"{shown} is encrypted")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise ArchiveError(f"{shown} is listed with two different sizes")
        # The bytes that `zipfile` has decoded, to be compared with those in front of the data.
        name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        try:
            header = read_bytes(self._source, info.header_offset, _LOCAL.size + len(name))
            magic, _, flags, method, _, _, crc, packed, unpacked, length, extra = _LOCAL.unpack_from(header)
        except (struct.error, EndsEarlyError, ValueError) as error:
            raise ArchiveError(f"{shown} lies outside the file") from error
        # Behind the data; or for Zip64 in the extra field, as 0xFFFFFFFF says.
        sizes_are_elsewhere = flags & _SIZES_BEHIND or 0xFFFFFFFF in (packed, unpacked)
        if (
            magic != b"PK\3\4"
            or header[_LOCAL.size :] != name
            or length != len(name)
            or method != info.compress_type
            or (flags ^ info.flag_bits) & (_ENCRYPTED | _SIZES_BEHIND)
            or not (sizes_are_elsewhere or (crc, packed, unpacked) == (info.CRC, info.compress_size, info.file_size))
        ):
            raise ArchiveError(f"{shown} does not match its entry in the archive's directory")
        return int(info.header_offset + _LOCAL.size + length + extra)


def open_archive(source: Source, shown: str) -> Archive:
    """The zip file `source`.

    Raises:
        CheckpointError: it is truncated or damaged.
    """
    try:
        return Archive(source)
    except (ArchiveError, zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        reason = printable(str(error) or type(error).__name__)
        raise CheckpointError(f"{shown} is truncated or damaged ({reason})", "download or copy it again") from error
