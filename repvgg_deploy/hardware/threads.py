"""Threads that end before the call or the `with` block that started them, whatever signal arrives meanwhile.

The interpreter must not exit while a thread runs: one that then returns from C++ is unwound by force, and the C++
runtime aborts the process ("terminate called without an active exception", exit status 134). Signals are handled in
the main thread, by raising KeyboardInterrupt or, for SIGTERM, SystemExit wherever it happens to be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar, cast

Result = TypeVar("Result")


class Cancellation:
    """A request to stop, set by one thread and read by another."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask to stop."""
        self._event.set()

    @property
    def is_wanted(self) -> bool:
        """Whether stopping was requested."""
        return self._event.is_set()


class _Task(threading.Thread, Generic[Result]):
    def __init__(self, call: Callable[[], Result]) -> None:
        super().__init__()
        self._call = call
        # Waited for before `join`: up to Python 3.12 a signal inside `join` makes the running thread count as ended.
        self.is_over = threading.Event()
        self.result: Result | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error
        finally:
            self.is_over.set()


def _wait_regardless(over: threading.Event) -> None:
    """Wait, however many signals arrive: leaving the library in mid-call aborts the process."""
    while not over.is_set():
        with suppress(KeyboardInterrupt, SystemExit):
            over.wait()


def run_cancellable(call: Callable[[], Result], cancellation: Cancellation | None = None) -> Result:
    """Run `call` in a thread and return its result; a signal asks it to stop, and is raised once it has.

    Python handles signals between bytecodes of the main thread only. A long call into C++ has none but those of its
    callbacks, and an exception that is raised there is lost. So nothing that takes long in C++ runs in the main
    thread, even where it cannot be stopped.
    """
    task = _Task(call)
    try:
        task.start()
        task.is_over.wait()
    except (KeyboardInterrupt, SystemExit):
        if cancellation is not None:
            cancellation.cancel()
        _wait_regardless(task.is_over)
        raise
    task.join()
    if task.error is not None:
        raise task.error
    return cast(Result, task.result)


@contextmanager
def start_workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` threads; leaving the block waits for all that was submitted, and no thread is alive after it.

    The pool's own `with` block joins in the main thread, which a signal breaks off.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        run_cancellable(pool.shutdown)
