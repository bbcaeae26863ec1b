"""Folders that belong to one process, and are removed by the next one if it was killed; locks on folders."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_ABANDONED_S = 24 * 3600
"""No run takes as long as this without writing a file; it counts where folders cannot be locked."""
# What some network file systems answer to a lock or to fsync of a folder.
_UNSUPPORTED = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES)


@dataclass(frozen=True)
class WorkFolder:
    """A folder of this process alone, locked for as long as the process lives and `descriptor` is open."""

    path: Path
    descriptor: int

    def remove(self) -> None:
        """Delete the folder and release its lock; what cannot be deleted is left for the next run."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Release the lock; a second call is a no-op."""
        with suppress(OSError):
            os.close(self.descriptor)


def make_work_folder(parent: Path, prefix: str, announce: Callable[[Path], None]) -> WorkFolder:
    """A new locked folder in `parent`, whose name is `prefix` and something random.

    `announce` gets the path before there is anything, for a signal that ends the process right after.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        announce(path)
        # Nobody else may look into it or add to it, also where the parent is a shared folder for temporary files.
        path.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            descriptor = open_folder(path)
            # Until it is locked, another process may take it for abandoned, and remove it.
            if _lock(descriptor, wait=False) is not False and path.exists():
                return WorkFolder(path, descriptor)
            os.close(descriptor)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders in `parent` that `make_work_folder` made with `prefix` for a process that was killed."""
    for path in list_work_folders(parent, prefix):
        with take_over(path) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(path, ignore_errors=True)


def list_work_folders(parent: Path, prefix: str) -> list[Path]:
    """The work folders of this user in `parent`; none where it cannot be listed."""
    found = []
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            # Only this user's: a folder of another one might be made to look like the rest of a run.
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                        found.append(parent / entry.name)
    return sorted(found)


@contextmanager
def take_over(path: Path) -> Iterator[bool]:
    """Whether the process that made the work folder `path` has ended; if so, it is locked during the block."""
    try:
        descriptor = open_folder(path)
    except OSError:
        yield False
        return
    try:
        locked = _lock(descriptor, wait=False)
        yield _is_old(path) if locked is None else locked
    finally:
        os.close(descriptor)


def _is_old(path: Path) -> bool:
    try:
        written = max(found.stat().st_mtime for found in (path, *path.rglob("*")))
    except OSError:
        return False
    return time.time() - written > _ABANDONED_S


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for other processes and threads that lock `folder`; where folders cannot be locked, for nobody."""
    try:
        descriptor = open_folder(folder)
    except PermissionError:
        # Such a folder may be written to, but not be listed.
        yield
        return
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        # Not by closing alone: a process that was forked meanwhile has the folder open as well.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool | None:
    """Whether the folder is locked now; None where folders cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


def open_folder(path: Path) -> int:
    """A descriptor of a folder."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def flush_files(folder: Path) -> None:
    """Wait until everything below `folder` is on the disk, the names too; quick where it is already."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            flush_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where the file system can tell."""
    try:
        descriptor = open_folder(folder)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
