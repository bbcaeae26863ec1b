"""How a process ends that has nothing left to do: at once.

The interpreter takes itself apart at its end, module by module. With torch loaded that is 0.15 s of CPU time, a
twentieth of what `export` of a small net takes, and all of it is memory that the system takes back anyway.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path


class QuickEnd:
    """The end of this process, once the interpreter's exit functions have run; to be made before any is registered."""

    def __init__(self) -> None:
        self._status: int | None = None
        # The one that was registered first is called last. Threads are waited for before all of them.
        atexit.register(self._end)

    def prepare(self, status: object) -> None:
        """End with this status; as always where it is not a number, or where somebody observes the process."""
        if isinstance(status, int) and not _is_observed():
            self._status = status

    def _end(self) -> None:
        if self._status is None:
            return
        with suppress(OSError, ValueError, AttributeError):
            # Where a stream fails, the interpreter says so in its own way.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._status)


def _is_observed() -> bool:
    """Whether somebody may wait for the end: a tracer or a profiler of Python, or one of the GPU."""
    if sys.gettrace() is not None or sys.getprofile() is not None:
        return True
    try:
        return "/libcuda.so" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
