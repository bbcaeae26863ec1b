"""Files that appear when all of them are whole: written beside their place, fsynced, then renamed one by one."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from repvgg_deploy.errors import DeployError

_PREFIX = ".repvgg-deploy-"
_ABANDONED_S = 24 * 3600
"""No export takes as long as this without writing a file."""


class _Unfinished:
    """What this process has begun on the disk and would have to undo if it ended now.

    `is_renaming`: finished files are taking their places, one after the other. `has_published`: results have.
    """

    def __init__(self) -> None:
        self.undo: dict[object, Callable[[], None]] = {}
        self.is_renaming = False
        self.has_published = False


_unfinished = _Unfinished()


@contextmanager
def undone_on_abort(undo: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """During the block, a signal that ends the process runs `undo` first; an exception or the block's end does not.

    Yields a function to call once there is nothing to undo any more, for a block that goes on after that.

    A command does not unwind when a signal ends it (see `cli.signals`): its `finally` blocks do not run. `undo` is
    called from another thread, while the main thread stands still in any place; so it must neither wait for a lock
    nor import anything.
    """
    key = object()
    _unfinished.undo[key] = undo

    def forget() -> None:
        _unfinished.undo.pop(key, None)

    try:
        yield forget
    finally:
        forget()


def is_past_abort() -> bool:
    """Whether it is too late to abort: results take their places now, or have, and nothing is left to undo."""
    return _unfinished.is_renaming or (_unfinished.has_published and not _unfinished.undo)


def undo_unfinished() -> bool:
    """Undo what was begun, the last first; False, and nothing is done, if the results were published meanwhile.

    For the end of the process, from a thread other than the main one.
    """
    while _unfinished.is_renaming:
        time.sleep(0.002)
    if is_past_abort():
        return False
    for undo in reversed(list(_unfinished.undo.values())):
        with suppress(Exception):
            undo()
    return True


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder of the system, removed at the end of the block or when a signal ends the process."""
    folder = Path(tempfile.gettempdir()) / f"repvgg-deploy-{secrets.token_hex(8)}"
    with undone_on_abort(lambda: _remove_folder(folder)):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def stage_files(folder: Path, is_result: bool = True) -> Iterator[Path]:
    """A temporary folder whose files replace those of `folder` when the block ends; after an error, none does.

    A folder in it is moved as a whole, to where there is none of its name.

    The temporary folder lies inside `folder`, so that the renames stay on one file system. A process that was killed
    leaves it there; the first call a day later removes it.

    Args:
        folder: made if it does not exist.
        is_result: the files are what the process is run for; a cache, or one of several results, is not.

    Raises:
        DeployError: `folder` cannot be made or written to, or the disk is full.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    staging = folder / f"{_PREFIX}{secrets.token_hex(8)}"

    def undo() -> None:
        _remove_folder(staging)
        _take_back(made)

    with undone_on_abort(undo) as forget:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            staging.mkdir(mode=0o700)
        except OSError as error:
            _take_back(made)
            raise DeployError(f"cannot write to {folder}: {error.strerror}", "choose another place with -o") from error
        finished = False
        try:
            yield staging
            _publish(staging, folder, forget if is_result else None)
            finished = True
        except OSError as error:
            if error.strerror is None:
                raise
            raise DeployError(
                f"cannot write to {folder}: {error.strerror}", "free some space or choose another -o"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if not finished:
                _take_back(made)


def _remove_folder(folder: Path) -> None:
    """Remove a folder that other threads may still be writing to; they get errors that nobody will read."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)


def _remove_abandoned(folder: Path) -> None:
    for left in folder.glob(f"{_PREFIX}*"):
        # Another process may be removing it as well.
        with suppress(OSError):
            written = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if left.is_dir() and time.time() - written > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)


def _take_back(made: list[Path]) -> None:
    """Remove the folders that this call made, innermost first, as far as they are empty still."""
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _publish(staging: Path, folder: Path, on_result: Callable[[], None] | None) -> None:
    flush_files(staging)
    names = sorted(path.name for path in staging.iterdir())
    blocked = next((name for name in names if (folder / name).is_dir()), None)
    if blocked is not None:
        raise DeployError(f"{folder / blocked} is a directory, so no file can take its place", "choose another -o")
    _unfinished.is_renaming = True
    try:
        for name in names:
            (staging / name).replace(folder / name)
        if on_result is not None:
            _unfinished.has_published = True
            on_result()
    finally:
        _unfinished.is_renaming = False


FileKind = Literal["checkpoint", "engine", "onnx"]


def file_kind(path: Path) -> FileKind:
    """What a model file is: by its ending, or of an ONNX graph by its first byte (ModelProto.ir_version).

    A plan's first bytes are the library's own affair. Whatever is neither is taken for a checkpoint.
    """
    if path.suffix in (".plan", ".engine", ".trt"):
        return "engine"
    if path.suffix == ".onnx":
        return "onnx"
    try:
        with path.open("rb") as file:
            return "onnx" if path.is_file() and file.read(1) == b"\x08" else "checkpoint"
    except OSError:
        return "checkpoint"


def flush_files(folder: Path) -> None:
    """Wait until all files below `folder` are on the disk; quick where they are already."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; other threads run meanwhile."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def data_folder(name: str) -> Path:
    """The folder `models` or `calibration`, as installed from a wheel or as found in the repository."""
    package = Path(__file__).resolve().parent
    packed = package / "_data" / name
    return packed if packed.is_dir() else package.parent / name


def cache_folder() -> Path:
    """The user's cache folder of this tool; `XDG_CACHE_HOME` counts where it is set.

    Raises:
        DeployError: there is none, as the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "repvgg-deploy"
    try:
        home = Path.home()
    except RuntimeError as error:
        # A user id that the system does not know, and no HOME.
        raise DeployError("there is no home folder for the cache", "set XDG_CACHE_HOME") from error
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "repvgg-deploy"
