"""How exact torch's float32 is on a GPU: TensorFloat-32 on or off, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32(tf32: bool = False, benchmark: bool = False, deterministic: bool = False) -> Iterator[None]:
    """Convolutions and matrix products in full float32, or with factors rounded to 10 bits of mantissa (`tf32`).

    `benchmark` lets cuDNN try its algorithms, `deterministic` keeps it to those that always give the same. All are
    switches of the whole process; they are set back at the end, and mean nothing on a CPU.
    """
    before = torch.get_float32_matmul_precision()
    flags = {"enabled": True, "benchmark": benchmark, "deterministic": deterministic, "allow_tf32": tf32}
    with torch.backends.cudnn.flags(**flags):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
