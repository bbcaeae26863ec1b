"""What a signal that ends the process undoes on the disk first, and when it is too late for that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


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
def renaming(on_result: Callable[[], None] | None) -> Iterator[None]:
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
