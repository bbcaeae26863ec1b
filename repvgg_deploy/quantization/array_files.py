"""What calibration and training keep for later: an `.npz` file of named arrays, and what is known of them as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from repvgg_deploy.checkpoints.archives import Archive, open_archive
from repvgg_deploy.checkpoints.npz_files import ArrayError, read_array, read_text
from repvgg_deploy.checkpoints.sources import MemorySource
from repvgg_deploy.errors import CheckpointError, DeployError
from repvgg_deploy.files.typed_values import convert, parse_json, read_file

Value = TypeVar("Value")

_ABOUT = "about"
# The widest nets have some hundred layers of some thousand channels.
_MOST_BYTES = 256 << 20
_MOST_ARRAYS = 100_000


def save_arrays(path: Path, about: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write arrays of numbers, and what is known of them, to an `.npz` file at `path`."""
    with path.open("wb") as file:
        np.savez(file, **{_ABOUT: np.array(json.dumps(dict(about))), **arrays})


class ArrayFile:
    """The content of such a file, which may be damaged or made by others: nothing is unpickled, no value is trusted.

    `name` is the file's in messages, `hint` what their reader can do.
    """

    def __init__(self, path: Path, name: str, hint: str) -> None:
        """Read the file.

        Raises:
            DeployError: it cannot be read, or is not of this kind; the message names the array.
        """
        self.name = name
        self.hint = hint
        try:
            content = read_file(path, name, hint, _MOST_BYTES)
            if not content:
                raise ArrayError("it is empty")
            self._read(open_archive(MemorySource(content), "it"))
        except FileNotFoundError as error:
            raise DeployError(f"there is no file {path}", "check the path") from error
        except (CheckpointError, ArrayError) as error:
            raise DeployError(f"cannot read {name}: {error}", hint) from error

    def _read(self, archive: Archive) -> None:
        if len(archive.names) > _MOST_ARRAYS:
            raise ArrayError(f"it has {len(archive.names)} arrays")
        keys = {name.removesuffix(".npy"): name for name in archive.names if name.endswith(".npy")}
        text = read_text(archive, f"{_ABOUT}.npy")
        # NumPy's strings may hold lone surrogates. Encoded like this they are bytes that no UTF-8 has, which the reader
        # of JSON refuses with an error of its own.
        self._about = parse_json(text.encode("utf-8", "surrogatepass"), f"{self.name}: {_ABOUT}", self.hint)
        self._arrays = {key: read_array(archive, name) for key, name in keys.items() if key != _ABOUT}

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return tuple(self._arrays)

    @property
    def kind(self) -> object:
        """What the file says it is; None if it does not."""
        return self._about.get("kind") if isinstance(self._about, dict) else None

    def about(self, kind: type[Value]) -> Value:
        """What is known of the arrays, as the dataclass `kind`.

        Raises:
            DeployError: a field is missing, of another type, or out of its bounds.
        """
        return convert(self._about, kind, f"{self.name}: {_ABOUT}", self.hint)

    def numbers(self, key: str, shape: tuple[int | None, ...]) -> Tensor:
        """The array `key` of finite floating-point numbers; None in `shape` is any length but 0.

        Raises:
            DeployError: it is missing, of another shape or type, or has other values.
        """
        stored = self._arrays.get(key)
        if stored is None:
            raise DeployError(f"{self.name}: {key} is missing", self.hint)
        if not stored.dtype.is_float:
            raise DeployError(f"{self.name}: {key} is of {stored.dtype.name}, not of floating-point numbers", self.hint)
        fits = len(stored.shape) == len(shape) and all(
            length > 0 if wanted is None else length == wanted
            for length, wanted in zip(stored.shape, shape, strict=False)
        )
        if not fits:
            raise DeployError(f"{self.name}: {key} has the shape {stored.shape!s:.60}, not {shape}", self.hint)
        try:
            values = torch.from_numpy(stored.load(key))
        except CheckpointError as error:
            raise DeployError(f"cannot read {self.name}: {error}", self.hint) from error
        if not bool(torch.isfinite(values).all()):
            raise DeployError(f"{self.name}: {key} has values that are not finite", self.hint)
        return values
