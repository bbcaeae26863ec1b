"""How exact torch's float32 is on a GPU: TensorFloat-32 on or off, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def float32(tf32: bool = False, benchmark: bool = False, deterministic: bool = False) -> Iterator[None]:
    """Convolutions and matrix products in full float32, or with factors rounded to 10 bits of mantissa (`tf32`).

    `benchmark` lets cuDNN try its algorithms, `deterministic` keeps it to those that always give the same. All are
    switches of the whole process; they are set back at the end, and mean nothing on a CPU.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Once torch's newer switches (2.9 on) are set, only they can be used.
        with _newer_switches(tf32, benchmark, deterministic):
            yield
        return
    # `flags` turns cuDNN off by default.
    flags = {"enabled": True, "benchmark": benchmark, "deterministic": deterministic, "allow_tf32": tf32}
    with torch.backends.cudnn.flags(**flags):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextmanager
def _newer_switches(tf32: bool, benchmark: bool, deterministic: bool) -> Iterator[None]:
    # Older releases, for which this is not called, have no `conv`.
    cudnn: Any = torch.backends.cudnn
    precision = "tf32" if tf32 else "ieee"
    wanted = [
        (cudnn, "enabled", True),
        (cudnn, "benchmark", benchmark),
        (cudnn, "deterministic", deterministic),
        (cudnn.conv, "fp32_precision", precision),
        (torch.backends.cuda.matmul, "fp32_precision", precision),
    ]
    with ExitStack() as back:
        for owner, name, value in wanted:
            back.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
