"""Files that take their places as one set: all of them or none, whatever fails and whenever the process ends.

A run writes into a work folder beside the places of its files, `.repvgg-deploy-…`, locked for as long as the process
lives:

    new/      the files, complete and on the disk before the first of them is moved
    old/      what they replace, as hard links
    journal   which files are moved, and what is in their places before and after

When a rename fails, the old files are put back, and the journal is called `rollback` meanwhile. A process that is
killed between two renames leaves one of them; whoever uses the folder next (see `finish_interrupted`) moves the rest,
or puts the old files back. A set that was not begun is dropped.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.journal import Move, encode_journal, identify, read_journal
from repvgg_deploy.files.work_folders import (
    WorkFolder,
    flush_files,
    flush_folder,
    list_work_folders,
    locked,
    make_work_folder,
    take_over,
)

_PREFIX = ".repvgg-deploy-"
_JOURNAL, _ROLLBACK = "journal", "rollback"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def begin(folder: Path, announce: Callable[[Path], None]) -> tuple[WorkFolder, Path]:
    """A work folder for files whose place is `folder`, which is made as well, and the folder in it to write them to.

    `announce` gets the work folder's path before there is anything.

    Raises:
        OSError: it cannot be made.
    """
    for attempt in range(3):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            finish_interrupted(folder)
            work = make_work_folder(folder, _PREFIX, announce)
            break
        except FileNotFoundError:
            # Another process had made the folder as well, failed, and removed it.
            if attempt == 2:
                raise
    try:
        (work.path / "new").mkdir()
    except OSError:
        work.remove()
        raise
    return work, work.path / "new"


def is_needed(work: Path) -> bool:
    """Whether a set was begun, and neither completed nor taken back: the next run does that."""
    return any((work / name).exists() for name in (_JOURNAL, _ROLLBACK))


def publish(
    work: WorkFolder, folder: Path, check: Callable[[], None], during: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Move the files of `work` to their places in `folder`; a folder in it as a whole, or into one of its name.

    Everything that is likely to fail is done before the first rename. SIGINT, SIGTERM and SIGHUP that arrive between
    the renames take effect after the last of them, if this is the main thread.

    Args:
        work: holds all files, which nobody writes to any more.
        folder: the parent of the work folder.
        check: called before the first rename, while the folder is locked.
        during: gives a context that is entered for the time of the renames.

    Raises:
        DeployError: a directory is in the place of a file, or the other way round; nothing was changed.
        OSError: the disk is full or fails; the old files are in their places.
    """
    # Before the folder is locked: that may take seconds, in which others would wait.
    flush_files(work.path / "new")
    with locked(folder):
        _finish_all(folder)
        check()
        moves = _plan(work.path / "new", folder)
        _keep_old(work.path, folder, moves)
        with during(), _held_signals():
            _write_journal(work.path, moves)
            _move(work.path, folder, moves)
            _forget(work.path / _JOURNAL)


def finish_interrupted(folder: Path) -> None:
    """Complete the sets in `folder` whose process was killed between two renames, and remove what killed ones left.

    Waits while another process renames its files there. Where nothing can be written, nothing is done.

    Raises:
        DeployError: a set cannot be completed, as its journal is damaged.
    """
    if list_work_folders(folder, _PREFIX):
        with suppress(OSError), locked(folder):
            _finish_all(folder)


def _is_special(path: Path) -> bool:
    """Whether a pipe, a socket or a device is at `path`: root could replace even /dev/null."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


def _plan(new: Path, folder: Path) -> list[Move]:
    """The moves, by name; a folder whose name is taken by a folder is not one, but what is in it."""
    moves: list[Move] = []
    for path in sorted(new.iterdir()):
        target = folder / path.name
        is_folder, was_folder = path.is_dir(), target.is_dir()
        if is_folder and was_folder:
            moves += [Move(f"{path.name}/{move.path}", move.new, move.old) for move in _plan(path, target)]
            continue
        if was_folder:
            raise DeployError(f"{target} is a directory, so no file can take its place", "choose another -o")
        if _is_special(target):
            raise DeployError(f"{target} is a pipe or a device, so no file can take its place", "choose another -o")
        if is_folder and os.path.lexists(target):
            raise DeployError(f"{target} is a file, so no directory can take its place", "choose another -o")
        identity = identify(path)
        assert identity is not None
        moves.append(Move(path.name, identity, identify(target)))
    return moves


def _keep_old(work: Path, folder: Path, moves: Sequence[Move]) -> None:
    for move in moves:
        if move.old is not None:
            kept = work / "old" / move.path
            kept.parent.mkdir(parents=True, exist_ok=True)
            # A file system without hard links, or another user's file: it is moved aside when the new one comes.
            with suppress(OSError):
                os.link(folder / move.path, kept, follow_symlinks=False)


def _write_journal(work: Path, moves: Sequence[Move]) -> None:
    beside = work / f"{_JOURNAL}.new"
    beside.write_text(encode_journal(moves), encoding="ascii")
    flush_files(work)
    # So that there is a whole journal, or none.
    beside.rename(work / _JOURNAL)
    try:
        flush_folder(work)
    except OSError:
        _forget(work / _JOURNAL)
        raise


def _forget(journal: Path) -> None:
    # One that cannot be removed describes what is so already, and does no harm.
    with suppress(OSError):
        journal.unlink()


def _move(work: Path, folder: Path, moves: Sequence[Move]) -> None:
    """Move what is not in its place yet; after an error everything is as it was before the first move."""
    try:
        for move in moves:
            new, target, kept = work / "new" / move.path, folder / move.path, work / "old" / move.path
            if os.path.lexists(new):
                if move.old is not None and not os.path.lexists(kept):
                    target.rename(kept)
                new.replace(target)
        # Before the journal is removed: after a power failure there is either the journal or every new name.
        for parent in {(folder / move.path).parent for move in moves}:
            flush_folder(parent)
    except BaseException as error:
        _roll_back(work, folder, moves, error)
        raise


def _roll_back(work: Path, folder: Path, moves: Sequence[Move], error: BaseException) -> None:
    """Put the old files back; if that fails too, the next run completes the set or puts them back.

    Raises:
        DeployError: a file could not be put back.
    """
    try:
        with suppress(FileNotFoundError):
            (work / _JOURNAL).rename(work / _ROLLBACK)
        for move in reversed(moves):
            new, target, kept = work / "new" / move.path, folder / move.path, work / "old" / move.path
            found = identify(target)
            if os.path.lexists(kept) and found in (None, move.new, move.old):
                kept.replace(target)
            elif move.old is None and found == move.new:
                target.rename(new)
    except OSError as second:
        raise DeployError(
            f"{folder} has files of two runs: writing failed ({error}), and so did restoring ({second.strerror})",
            f"once the disk works, run any command on these files: it begins by mending them from {work.name}",
        ) from error
    _forget(work / _ROLLBACK)


def _finish_all(folder: Path) -> None:
    for path in list_work_folders(folder, _PREFIX):
        with take_over(path) as is_abandoned:
            if is_abandoned:
                _finish(path, folder)
                shutil.rmtree(path, ignore_errors=True)


def _finish(work: Path, folder: Path) -> None:
    """Complete the set of a killed process, if it was begun and nobody has changed its files since."""
    rollback, journal = work / _ROLLBACK, work / _JOURNAL
    if rollback.exists():
        moves = _read_moves(rollback, folder)
        with _held_signals():
            _roll_back(work, folder, moves, OSError("interrupted"))
    if not journal.exists():
        return
    moves = _read_moves(journal, folder)
    states = {_state(work, folder, move) for move in moves}
    if "foreign" not in states and states & {"moved", "between"}:
        with _held_signals():
            _move(work, folder, moves)
    # Removed first: what is left of the folder after a second kill is not taken for a set.
    _forget(journal)


def _read_moves(journal: Path, folder: Path) -> list[Move]:
    """The moves of a set that was begun; none if its journal is damaged and all new files have taken their places.

    Raises:
        DeployError: the journal is damaged, so nobody can say which files are of which run; nothing was changed.
    """
    moves = read_journal(journal, folder)
    work = journal.parent
    # Of a set that is being taken back, the old files count as well.
    places = [work / "new", *([work / "old"] if journal.name == _ROLLBACK else [])]
    if moves is None and any(path.is_symlink() or not path.is_dir() for place in places for path in place.rglob("*")):
        raise DeployError(
            f"{folder} may have files of two runs: the journal of the one that was interrupted, {journal}, is damaged",
            f"its files are in {work}/new, those from before in {work}/old: move what you want to keep to its place, "
            "and delete that folder",
        )
    return moves or []


def _state(work: Path, folder: Path, move: Move) -> str:
    """`waiting`, `moved`, `between` (the old file is aside, the new one is not there), or `foreign`."""
    found = identify(folder / move.path)
    if not os.path.lexists(work / "new" / move.path):
        return "moved" if found == move.new else "foreign"
    if found == move.old:
        return "waiting"
    return "between" if found is None and os.path.lexists(work / "old" / move.path) else "foreign"


@contextmanager
def _held_signals() -> Iterator[None]:
    """During the block the signals that end a process only count; they take effect when it ends.

    Handlers run in the main thread, and only it may set them. In other threads nothing is held; what a signal leaves
    there, `finish_interrupted` mends.
    """
    arrived: list[int] = []
    handlers: Mapping[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in _SIGNALS}
        # None is a handler that was not set from Python, and cannot be set again from here.
        handlers = {number: handler for number, handler in found.items() if handler not in (None, signal.SIG_IGN)}

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    try:
        for number in handlers:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)
