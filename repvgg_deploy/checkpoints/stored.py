"""Tensors as a file describes them, which take no memory before they are requested."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.checkpoints.number_types import NumberType, widen_bfloat16
from repvgg_deploy.checkpoints.sources import Source
from repvgg_deploy.errors import CheckpointError

AGAIN = "download or copy the file again"

Bytes: TypeAlias = NDArray[np.uint8]


class Blob(Protocol):
    """A run of bytes in a file; `load` gives them as one array, checked and always the same one."""

    nbytes: int

    def load(self) -> Bytes:
        """The bytes."""


class Span:
    """The bytes of a source from `offset` on, with the CRC-32 that the file gives for them where it gives one."""

    def __init__(self, name: str, source: Source, offset: int, nbytes: int, crc: int | None = None) -> None:
        self.nbytes = nbytes
        self._place = (name, source, offset, crc)

    def place_at(self, offset: int) -> None:
        """Set where the bytes begin, which some files say only at their end."""
        name, source, _, crc = self._place
        self._place = (name, source, offset, crc)

    def load(self) -> Bytes:
        """The bytes; raise CheckpointError where they are not those that were written."""
        return self._content

    @cached_property
    def _content(self) -> Bytes:
        name, source, offset, crc = self._place
        content = np.empty(self.nbytes, np.uint8)
        memory = memoryview(content)  # type: ignore[arg-type]
        source.fill(offset, memory)
        if crc is not None and zlib.crc32(memory) != crc:
            raise CheckpointError(f"{name} is damaged: its checksum does not match its bytes", AGAIN)
        return content


class Deferred:
    """`nbytes` bytes that `read` gives, decompressed or taken from a pickle."""

    def __init__(self, nbytes: int, read: Callable[[], bytes]) -> None:
        self.nbytes = nbytes
        self._read = read

    def load(self) -> Bytes:
        """The bytes."""
        return self._content

    @cached_property
    def _content(self) -> Bytes:
        content = self._read()
        if len(content) != self.nbytes:
            raise CheckpointError("a tensor's number of bytes is not what the file says", AGAIN)
        # A copy that can be written to, as torch wants it.
        return np.frombuffer(bytearray(content), np.uint8)


@dataclass(frozen=True, eq=False)
class Storage:
    """A torch storage: bytes that are numbers of one type, most significant byte first where `big_endian`."""

    blob: Blob
    dtype: NumberType
    big_endian: bool = False


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A view of a storage, as `torch.Tensor` is one: sizes in numbers, not bytes.

    `problem` says why it cannot be read: it is sparse, quantized, without values, …; there is no storage then.
    """

    shape: tuple[int, ...]
    dtype: NumberType
    stride: tuple[int, ...] = ()
    offset: int = 0
    storage: Storage | None = None
    problem: str | None = None

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """How many numbers the tensor has."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor once each of its numbers has a place of its own."""
        return self.numel() * self.dtype.itemsize

    @property
    def identity(self) -> tuple[int, int, tuple[int, ...]]:
        """Equal for two views of the same numbers."""
        return id(self.storage.blob if self.storage else self), self.offset, self.shape

    def load(self, name: str) -> NDArray[Any]:
        """The numbers, bfloat16 as float32; raise CheckpointError if they are damaged or reach beyond the storage."""
        if self.problem is not None or self.storage is None:
            raise CheckpointError(f"{name} {self.problem or 'has no storage'}", "save the weights as plain tensors")
        first, behind = self._span(name)
        if behind > self.storage.blob.nbytes:
            raise CheckpointError(
                f"{name} of shape {self.shape} needs {behind} bytes, but its storage has {self.storage.blob.nbytes}",
                "the file is damaged: " + AGAIN,
            )
        if first == behind:
            return np.empty(self.shape, self.dtype.raw)
        content = self.storage.blob.load()[first:behind]
        if self.storage.big_endian and self.dtype.itemsize > 1:
            content = _swap_bytes(content, self.dtype)
        # The stride of one number means nothing, and may be any.
        width = self.dtype.itemsize
        stride = tuple(step * width if n > 1 else width for n, step in zip(self.shape, self.stride, strict=True))
        # This constructor checks that the strides stay inside the buffer, which `as_strided` does not.
        numbers: NDArray[Any] = np.ndarray(self.shape, self.dtype.raw, content.data, 0, stride)
        return widen_bfloat16(numbers) if self.dtype.name == "bfloat16" else numbers

    def _span(self, name: str) -> tuple[int, int]:
        """The first byte in the storage, and the one after the last."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            raise CheckpointError(f"{name} has the shape {self.shape} and the stride {self.stride}", AGAIN)
        size = self.dtype.itemsize
        if self.numel() == 0:
            return 0, 0
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset * size, (last + 1) * size


def _swap_bytes(content: Bytes, dtype: NumberType) -> Bytes:
    """A copy in this machine's byte order; a complex number is two numbers."""
    width = dtype.itemsize // (2 if dtype.raw.kind == "c" else 1)
    return content.view(f"u{width}").byteswap().view(np.uint8)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose last index runs fastest."""
    stride = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * max(shape[axis + 1], 1)
    return tuple(stride)
