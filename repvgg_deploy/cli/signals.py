"""A signal ends a command at once and cleanly, whatever it is doing: C++ code, an import, a callback.

Python's own way is to raise an exception in the main thread. That is lost inside a callback of a C library, aborts the
process inside C++ that expects none, leaves a module half imported, waits as long as a call into C takes, and is taken
for an ordinary error by code that catches everything. So nothing is raised here. Python's handler writes the signal's
number to a pipe the moment it arrives, whatever the main thread does. A thread reads it, undoes what was begun on the
disk, and ends the process without unwinding anything.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from types import FrameType
from typing import NoReturn

from repvgg_deploy.files.abort import is_past_abort, last_words, undo_unfinished
from repvgg_deploy.files.printable import printable

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
# The process may be in the middle of a line; on a terminal the blank line also closes its `^C`.
_MESSAGE = b"\nAborted!\n"


def end_on_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end this process with status 128 + number, after undoing what was begun.

    Once the results are in their places, signals are ignored. What is ignored already stays ignored, as `nohup` and
    background jobs of a shell want it. For a process that runs one command, called in its main thread; a second call
    does nothing.
    """
    numbers = [number for number in _SIGNALS if signal.getsignal(number) in _DEFAULTS]
    if not numbers:
        return
    reading, writing = os.pipe()
    # `set_wakeup_fd` takes no pipe that blocks. When one is full, there is a signal in it already.
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, _stand_still)
    threading.Thread(target=_end_process_on, args=(reading,), name="signals", daemon=True).start()
    # The interpreter is torn down after that, and the thread would no longer run.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in numbers])


def _stand_still(_number: int, _frame: FrameType | None) -> None:
    """Stop the main thread, so that it does not fail on files that are being removed."""
    while not is_past_abort():
        time.sleep(0.05)


def _end_process_on(pipe: int) -> NoReturn:
    while True:
        number = os.read(pipe, 1)[0]
        if undo_unfinished():
            # Without the progress display, for whose lock the main thread may be standing still.
            lines = (f"{printable(words)}\n".encode() for words in last_words())
            os.write(2, b"".join((_MESSAGE, *lines)))
            os._exit(128 + number)
