"""A fault at the n-th system call that changes something on the disk, in a child process made by fork.

Python announces these calls to audit hooks before it makes them, but for fsync. A hook stays for the life of a process,
which is the child's. A fault before call n + 1 is one after call n.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from repvgg_deploy.errors import DeployError

_CALLS = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock")
FAILED, CRASHED = 1, 99
"""Statuses of a child that reported an error to its user, and of one that ended in a traceback."""

Fault = Callable[[], None]


def fail() -> None:
    """The call fails, as on a broken disk."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def send(number: signal.Signals) -> Fault:
    """A signal arrives just before the call."""
    return lambda: os.kill(os.getpid(), number)


def install(number: int, fault: Fault, lasting: bool = False) -> list[str]:
    """From now on in this process, `fault` happens at the call `number`, counted from 0, or at all from there on.

    Returns the list that will hold the names of the calls.
    """
    calls: list[str] = []

    def count(name: str) -> None:
        calls.append(name)
        if len(calls) == number + 1 or (lasting and len(calls) > number):
            fault()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # A file that is opened for writing; flags are None where another function opens it.
        is_writing = event == "open" and isinstance(arguments[1], str) and bool({*arguments[1]} & {*"wax+"})
        if event in _CALLS or is_writing:
            count(event)

    real = os.fsync

    def fsync(descriptor: int) -> None:
        count("os.fsync")
        real(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)
    return calls


def run_child(work: Callable[[], None]) -> int:
    """The status of a child that does `work`: 0, `FAILED` after a DeployError, or minus the signal that killed it."""
    with warnings.catch_warnings():
        # Threads of this process are not in the child, which needs none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        except (DeployError, KeyboardInterrupt):
            os._exit(FAILED)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(CRASHED)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_calls(work: Callable[[], None]) -> list[str]:
    """The names of the calls that `work` makes, in a child without a fault."""
    reading, writing = os.pipe()

    def report() -> None:
        calls = install(sys.maxsize, fail)
        work()
        os.write(writing, ",".join(calls).encode())

    assert run_child(report) == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read().split(",")
