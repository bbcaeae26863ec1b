"""Settings of the process: memory and threads for hundreds of megabytes of weights, and what libraries may print."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from repvgg_deploy.hardware.cpu import core_limit

# malloc.h of glibc: parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1


def share_cores() -> None:
    """Settings of torch's threads beside others that work; to be called before torch is loaded.

    They sleep when they have nothing to do, where they would spin and take a core from the threads that decode images,
    or from the stage that runs beside them; in a container there are no more than its share of the CPU is worth. What
    the user has set in the environment stays.
    """
    # Read when torch is loaded, by its OpenMP runtime.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if (cores := core_limit()) is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def prepare_process() -> None:
    """Settings for a process that does one thing after another to large weights; to be called before torch is loaded.

    It keeps the memory that it frees, and takes large tensors in huge pages: the system hands out memory page by page
    and zeroes each, which on a virtual machine takes longer than the fusing that fills it. Its threads are those of
    `share_cores`. What the user has set in the environment stays; where the C library is not glibc its part is left
    out.
    """
    share_cores()
    # Read when torch is loaded: c10/core/impl/alloc_cpu.cpp.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    keep_freed_memory(mallopt)


def keep_freed_memory(mallopt: Callable[[int, int], int]) -> None:
    """Let glibc take large blocks from the heap and keep them when they are freed; by default it maps each anew.

    `mallopt` sets a parameter to a value, and returns 0 if it does not.
    """
    # Older releases refuse more than 32 MiB. With the other parameter alone they would map all from 128 KiB on, as
    # setting either ends the adaptation to what is freed.
    if not mallopt(_MMAP_THRESHOLD, 1 << 30):
        mallopt(_MMAP_THRESHOLD, 32 << 20)
    mallopt(_TRIM_THRESHOLD, _LARGEST_INT)


def silence_libraries() -> None:
    """Keep warnings that libraries give to programmers out of the user's log; `python -W` shows them all the same."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Keep the garbage collector away from the imports inside, and from their objects when the process ends.

    They make hundreds of thousands of objects, all of which stay; scanning them takes half a second. Where torch
    is loaded already, as in somebody's own process, nothing is changed.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
