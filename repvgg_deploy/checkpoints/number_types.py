"""The types of the numbers in checkpoints, by torch's names but without torch, which takes a second to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NumberType:
    """A type of numbers by torch's name; `raw` is numpy's type of the same bytes, unsigned where numpy has no such."""

    name: str
    raw: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        """The bytes of a number."""
        return self.raw.itemsize

    @property
    def is_float(self) -> bool:
        """Whether a net can have weights of this type."""
        return self.name in ("float16", "bfloat16", "float32", "float64")


_RAW = {"bfloat16": "uint16"} | dict.fromkeys(
    ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), "uint8"
)
NUMBER_TYPES = {
    name: NumberType(name, np.dtype(_RAW.get(name, name)))
    for name in (
        *("float16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *_RAW,
    )
}
"""By name, all that are read."""


def widen_bfloat16(raw: NDArray[Any]) -> NDArray[Any]:
    """Numbers of bfloat16, given as unsigned ones of 16 bits, in float32: they are its upper half."""
    widened: NDArray[Any] = (raw.astype(np.uint32) << 16).view(np.float32)
    return widened
