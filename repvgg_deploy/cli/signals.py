"""Ctrl-C and SIGTERM become exceptions of the main thread, but not while it imports or holds a lock of the library."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import thread as pools
from contextlib import contextmanager
from types import FrameType

_RETRY_S = 0.02
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
# Functions of `threading` that may take long, and that an exception may leave.
_WAITS = ("wait", "wait_for", "join", "_wait_for_tstate_lock")


@contextmanager
def raise_signals() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM raises SystemExit(143), as soon as that does no harm.

    An exception inside the C++ of an extension that is being loaded aborts the process (status 134), and a module that
    was loaded by half fails later in its own way. One that leaves `threading` or a pool between taking a lock and
    knowing of it leaves the lock taken, and the threads that need it wait for ever. In a thread that is not the main
    one nothing is changed, nor is a handler that somebody else has set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) in _DEFAULTS}
    pending: list[int] = []
    raised: list[int] = []
    outside = _count_imports(sys._getframe())

    def handle(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            pending.append(number)
        if not pending:
            return
        if signal.SIGALRM in before and (_count_imports(frame) > outside or _is_in_lock(frame)):
            signal.setitimer(signal.ITIMER_REAL, _RETRY_S)
            return
        raised.append(pending[0])
        pending.clear()
        raise _exception_of(raised[0])

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    except Exception:
        # A library in C that calls Python back makes an error of its own of whatever is raised there.
        if raised:
            raise _exception_of(raised[0]) from None
        raise
    finally:
        if signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _exception_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _count_imports(frame: FrameType | None) -> int:
    """The frames of the import system among `frame` and its callers."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count


def _is_in_lock(frame: FrameType | None) -> bool:
    """Whether `frame` or a caller is code of `threading` or of a pool that holds a lock, or may."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == pools.__file__ or (
            code.co_filename == threading.__file__ and code.co_name not in _WAITS
        ):
            return True
        frame = frame.f_back
    return False
