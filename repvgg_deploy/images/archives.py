"""Images inside tar archives, found by their headers and read in place; nothing is unpacked."""

from __future__ import annotations

import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Tar pads headers and data to blocks of this size, and ends with blocks of zeros.
_BLOCK = 512
_NESTED = ".tar"


@dataclass(frozen=True)
class TarMember:
    """A file in an uncompressed tar archive: its `size` bytes begin at `offset` of `archive`.

    `name` is the member's; one of an archive inside the archive is `inner.tar/name`.
    """

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """The bytes of the member; fewer than `size` where the archive has become shorter."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class ArchiveIndex:
    """The files of an archive in its own order; `problem` says why there may be more that cannot be found."""

    members: tuple[TarMember, ...]
    problem: str | None = None


def index_archive(path: Path) -> ArchiveIndex:
    """The files in a tar archive, and in the tar archives that are its members, as ImageNet's training set has them."""
    members: list[TarMember] = []
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # Opening a pipe may never end.
            return ArchiveIndex((), "not a regular file")
        with path.open("rb") as file:
            # What was found before an error stays in the list.
            members.extend(_walk(path, file, "", depth=1))
    except (OSError, tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        return ArchiveIndex(tuple(members), _explain(error))
    return ArchiveIndex(tuple(members))


def _walk(path: Path, file: BinaryIO, prefix: str, depth: int) -> Iterator[TarMember]:
    # Python's module reads from where the file stands, so an inner archive needs no file of its own.
    # Only uncompressed ones: members are read in place, by their offset.
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                continue
            if member.size < 0:
                # Python's module reads such a size from a number of 12 bytes.
                raise tarfile.ReadError("damaged: a member has a negative size")
            name = prefix + member.name
            if depth and member.name.lower().endswith(_NESTED):
                file.seek(member.offset_data)
                yield from _walk(path, file, f"{name}/", depth - 1)
            else:
                yield TarMember(path, name, member.offset_data, member.size)
        # The module mistakes any damaged header but the first for the end of the archive.
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("damaged or cut off: no end marker after its last member")


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"not a whole, uncompressed tar archive ({text})"
