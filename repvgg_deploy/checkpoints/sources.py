"""The bytes of a checkpoint file: read by position, hashed, and held against being written to meanwhile."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from repvgg_deploy.checkpoints.other_files import describe_folder
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable

_BLOCK = 1 << 22


class EndsEarlyError(Exception):
    """The requested bytes lie beyond the end of the file."""


class Source(Protocol):
    """Bytes of a known number that are read by position."""

    size: int

    def fill(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on, or raise EndsEarlyError."""


class FileSource:
    """An open file. Nothing of it is mapped: a file that is cut while it is mapped ends the process with SIGBUS."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._opened = os.fstat(descriptor)
        self.size = self._opened.st_size

    def fill(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on, or raise EndsEarlyError."""
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done:]], offset + done)
            if count == 0:
                raise EndsEarlyError
            done += count

    def hash(self) -> str:
        """The sha256 of the file, in hexadecimal; other threads run meanwhile."""
        digest = hashlib.sha256()
        block = memoryview(bytearray(min(_BLOCK, max(self.size, 1))))
        for offset in range(0, self.size, len(block)):
            part = block[: min(len(block), self.size - offset)]
            self.fill(offset, part)
            digest.update(part)
        return digest.hexdigest()

    @property
    def was_written(self) -> bool:
        """Whether the file has been written to or cut since it was opened; one that was replaced has not."""
        now = os.fstat(self._descriptor)
        return (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns)


class MemorySource:
    """Bytes in memory: a file that lay inside another one."""

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self.size = len(content)

    def fill(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on, or raise EndsEarlyError."""
        part = self._content[offset : offset + len(target)]
        if len(part) != len(target):
            raise EndsEarlyError
        target[:] = part


def read_bytes(source: Source, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, or fewer at the end of the source."""
    content = bytearray(max(0, min(length, source.size - offset)))
    source.fill(offset, memoryview(content))
    return bytes(content)


def open_stream(source: Source) -> IO[bytes]:
    """The source as a file object that reads and seeks, and never takes more memory than the source has bytes."""
    return io.BufferedReader(_Stream(source), 1 << 16)


class _Stream(io.RawIOBase):
    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise ValueError("a position before the start of the file")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._source.size - self._position))
        self._source.fill(self._position, memoryview(buffer)[:count])
        self._position += count
        return count


@contextmanager
def open_source(path: Path) -> Iterator[FileSource]:
    """The regular file `path`, open for the block; leaving it fails if the file was written to meanwhile.

    Raises:
        CheckpointError: there is no such file, it cannot be read, it is a pipe or a device, it is empty, or it was
            written to while it was read.
    """
    shown = printable(str(path))
    try:
        # A pipe without a writer would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no file {shown}", "check the path; random weights are never used instead"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"there is no file {shown}: {error}", "check the path") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {shown}: {error.strerror}", "check the path and its permissions") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise describe_folder(path)
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{shown} is a pipe or a device", "save what comes from it to a file")
        source = FileSource(path, descriptor)
        if source.size == 0:
            raise CheckpointError(f"{shown} is empty", "download or copy it again")
        yield from _watch(source, shown)
    finally:
        os.close(descriptor)


def _watch(source: FileSource, shown: str) -> Iterator[FileSource]:
    changed = f"{shown} was written to while it was read"
    hint = "wait until it is complete, or copy it and give the copy"
    try:
        yield source
    except (CheckpointError, EndsEarlyError, OSError) as error:
        if source.was_written:
            raise CheckpointError(changed, hint) from error
        if isinstance(error, CheckpointError):
            raise
        reason = str(error) or "it ends early"
        raise CheckpointError(f"cannot read {shown}: {reason}", "download or copy it again") from error
    if source.was_written:
        raise CheckpointError(changed, hint)
