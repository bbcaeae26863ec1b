"""Ctrl-C and SIGTERM become exceptions of the main thread, but not while it imports."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_RETRY_S = 0.02
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def raise_signals() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM raises SystemExit(143), once no import is under way.

    An exception inside the C++ of an extension that is being loaded aborts the process (status 134), and a module that
    was loaded by half fails later in its own way. In a thread that is not the main one nothing is changed, nor is a
    handler that somebody else has set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) in _DEFAULTS}
    pending: list[int] = []
    outside = _count_imports(sys._getframe())

    def handle(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            pending.append(number)
        if not pending:
            return
        if signal.SIGALRM in before and _count_imports(frame) > outside:
            signal.setitimer(signal.ITIMER_REAL, _RETRY_S)
            return
        first = pending[0]
        pending.clear()
        if first == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + first)

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        if signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _count_imports(frame: FrameType | None) -> int:
    """The frames of the import system among `frame` and its callers."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count
