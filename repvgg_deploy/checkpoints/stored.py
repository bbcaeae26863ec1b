"""Tensors as a file describes them, which take no memory before they are requested."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from repvgg_deploy.checkpoints.sources import Source
from repvgg_deploy.errors import CheckpointError

_AGAIN = "download or copy the file again"


class Blob(Protocol):
    """A run of bytes in a file; `load` gives them as a tensor of uint8, checked and always the same one."""

    nbytes: int

    def load(self) -> Tensor:
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

    def load(self) -> Tensor:
        """The bytes; raise CheckpointError where they are not those that were written."""
        return self._content

    @cached_property
    def _content(self) -> Tensor:
        name, source, offset, crc = self._place
        content = torch.empty(self.nbytes, dtype=torch.uint8)
        memory = memoryview(content.numpy())  # type: ignore[arg-type]
        source.fill(offset, memory)
        if crc is not None and zlib.crc32(memory) != crc:
            raise CheckpointError(f"{name} is damaged: its checksum does not match its bytes", _AGAIN)
        return content


class Deferred:
    """`nbytes` bytes that `read` gives, decompressed or taken from a pickle."""

    def __init__(self, nbytes: int, read: Callable[[], bytes]) -> None:
        self.nbytes = nbytes
        self._read = read

    def load(self) -> Tensor:
        """The bytes."""
        return self._content

    @cached_property
    def _content(self) -> Tensor:
        content = self._read()
        if len(content) != self.nbytes:
            raise CheckpointError("a tensor's number of bytes is not what the file says", _AGAIN)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Storage:
    """A torch storage: bytes that are numbers of one type, most significant byte first where `big_endian`."""

    blob: Blob
    dtype: torch.dtype
    big_endian: bool = False


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A view of a storage, as `torch.Tensor` is one: sizes in numbers, not bytes.

    `problem` says why it cannot be read: it is sparse, quantized, without values, …; there is no storage then.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
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

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU; raise CheckpointError where it is damaged or reaches beyond its storage."""
        if self.problem is not None or self.storage is None:
            raise CheckpointError(f"{name} {self.problem or 'has no storage'}", "save the weights as plain tensors")
        first, behind = self._span(name)
        if behind > self.storage.blob.nbytes:
            raise CheckpointError(
                f"{name} of shape {self.shape} needs {behind} bytes, but its storage has {self.storage.blob.nbytes}",
                "the file is damaged: " + _AGAIN,
            )
        if first == behind:
            return torch.empty(self.shape, dtype=self.dtype)
        content = self.storage.blob.load()[first:behind]
        if self.storage.big_endian and self.dtype.itemsize > 1:
            content = _swap_bytes(content, self.dtype)
        return content.view(self.dtype).as_strided(self.shape, self.stride)

    def _span(self, name: str) -> tuple[int, int]:
        """The first byte in the storage, and the one after the last."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            raise CheckpointError(f"{name} has the shape {self.shape} and the stride {self.stride}", _AGAIN)
        size = self.dtype.itemsize
        if self.numel() == 0:
            return 0, 0
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset * size, (last + 1) * size


def _swap_bytes(content: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in this machine's byte order; a complex number is two numbers."""
    width = dtype.itemsize // (2 if dtype.is_complex else 1)
    return torch.from_numpy(np.frombuffer(content.numpy().tobytes(), f"u{width}").byteswap().view(np.uint8))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose last index runs fastest."""
    stride = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * max(shape[axis + 1], 1)
    return tuple(stride)
