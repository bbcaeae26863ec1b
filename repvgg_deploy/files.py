"""Files that appear when all of them are whole: written beside their place, then published as one set."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from repvgg_deploy import publishing
from repvgg_deploy.errors import DeployError
from repvgg_deploy.work_folders import make_work_folder, remove_abandoned

_SCRATCH_PREFIX = "repvgg-deploy-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Unfinished:
    """What this process has begun on the disk and would have to undo if it ended now.

    `is_renaming`: finished files are taking their places, one after the other. `has_published`: results have.
    `is_ending`: a signal ends the process. `last_words` is what the user should know then.
    """

    def __init__(self) -> None:
        self.undo: dict[object, Callable[[], str | None]] = {}
        self.last_words: list[str] = []
        self.is_renaming = False
        self.has_published = False
        self.is_ending = False


_unfinished = _Unfinished()


@contextmanager
def undone_on_abort(undo: Callable[[], str | None]) -> Iterator[Callable[[], None]]:
    """During the block, a signal that ends the process runs `undo` first; an exception or the block's end does not.

    What `undo` returns is printed, for the user to know what is left.

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
    _unfinished.is_ending = True
    while _unfinished.is_renaming:
        time.sleep(0.002)
    if is_past_abort():
        _unfinished.is_ending = False
        return False
    for undo in reversed(list(_unfinished.undo.values())):
        with suppress(Exception):
            if (words := undo()) is not None:
                _unfinished.last_words.append(words)
    return True


def last_words() -> tuple[str, ...]:
    """What the user should know of what `undo_unfinished` left on the disk."""
    return tuple(_unfinished.last_words)


@contextmanager
def _renaming(on_result: Callable[[], None] | None) -> Iterator[None]:
    """The block is not interrupted by the end of the process; then `on_result` is called, if these are results."""
    _unfinished.is_renaming = True
    while _unfinished.is_ending:
        # Only in a thread that signals do not stop.
        _unfinished.is_renaming = False
        time.sleep(0.01)
        _unfinished.is_renaming = True
    try:
        yield
        if on_result is not None:
            _unfinished.has_published = True
            on_result()
    finally:
        _unfinished.is_renaming = False


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder of the system, removed at the end of the block or when a signal ends the process.

    What a process that was killed left there is removed first.

    Raises:
        DeployError: it cannot be made, or the disk is full.
    """
    begun: list[Path] = []
    with undone_on_abort(lambda: _remove_folders(begun)):
        try:
            parent = Path(tempfile.gettempdir())
            remove_abandoned(parent, _SCRATCH_PREFIX)
            work = make_work_folder(parent, _SCRATCH_PREFIX, begun.append)
            # Not the work folder itself, which is locked: files that are published in it would wait for that for ever.
            inside = work.path / "files"
            inside.mkdir()
        except OSError as error:
            raise DeployError(f"there is no place for temporary files: {error.strerror}", "set TMPDIR") from error
        try:
            yield inside
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DeployError(f"cannot write to {parent}: {error.strerror}", "free some space or set TMPDIR") from error
        finally:
            work.remove()


@contextmanager
def stage_files(folder: Path, is_result: bool = True, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A temporary folder whose files replace those of `folder` when the block ends; after an error, none does.

    They appear as one set, whatever fails and whenever the process ends; see `publishing`. A folder among them is moved
    as a whole to where there is none of its name, and else what is in it is moved. Where there is a set of a process
    that was killed in the middle, it is completed first.

    The temporary folder lies inside `folder`, so that the renames stay on one file system. A process that was killed
    leaves it there; the next call removes it.

    Args:
        folder: made if it does not exist.
        is_result: the files are what the process is run for; a cache, or one of several results, is not.
        check: called right before the first rename, while other processes wait with theirs; what it raises stops all.

    Raises:
        DeployError: `folder` cannot be made or written to, or the disk is full.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    begun: list[Path] = []

    def undo() -> None:
        _remove_folders(path for path in begun if not publishing.is_needed(path))
        _take_back(made)

    with undone_on_abort(undo) as forget:
        try:
            work, staging = publishing.begin(folder, begun.append)
        except OSError as error:
            _take_back(made)
            raise DeployError(f"cannot write to {folder}: {error.strerror}", "choose another place with -o") from error
        finished = False
        try:
            yield staging
            publishing.publish(work, folder, check, lambda: _renaming(forget if is_result else None))
            finished = True
        except OSError as error:
            if error.strerror is None:
                raise
            raise DeployError(
                f"cannot write to {folder}: {error.strerror}", "free some space or choose another -o"
            ) from error
        finally:
            work.release() if publishing.is_needed(work.path) else work.remove()
            if not finished:
                _take_back(made)


def _remove_folders(folders: Iterable[Path]) -> None:
    """Remove folders that other threads may still be writing to; they get errors that nobody will read."""
    for folder in folders:
        # Under another name nothing is added to it; one that is written to faster than it is emptied would stay.
        aside = folder.with_name(f"{folder.name}-ended")
        with suppress(OSError):
            folder.rename(aside)
        for _ in range(100):
            for path in (aside, folder):
                shutil.rmtree(path, ignore_errors=True)
            if not aside.exists() and not folder.exists():
                break
            time.sleep(0.01)


def _take_back(made: list[Path]) -> None:
    """Remove the folders that this call made, innermost first, as far as they are empty still."""
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


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
        # Opening a pipe may never end.
        if not path.is_file():
            return "checkpoint"
        with path.open("rb") as file:
            return "onnx" if file.read(1) == b"\x08" else "checkpoint"
    except OSError:
        return "checkpoint"


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
