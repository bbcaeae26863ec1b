"""Files to tensors: every container a checkpoint comes in, and never a line of code executed from it."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg_deploy.errors import CheckpointError

_TO_SAFETENSORS = (
    'where you trust the file, convert it once: python -c "import torch, safetensors.torch as s; '
    "c = torch.load('FILE', map_location='cpu', weights_only=False); "
    "c = next((c[k] for k in ('state_dict', 'model', 'model_ema', 'ema') if isinstance(c, dict) and k in c), c); "
    "c = c if isinstance(c, dict) else c.state_dict(); "
    "s.save_file({k: v.clone().contiguous() for k, v in c.items() if torch.is_tensor(v)}, 'FILE.safetensors')\""
)
_WRAPPERS = frozenset(
    "module model _orig_mod timm_model backbone net network encoder student online_model".split()  # noqa: SIM905
)
_EMA = re.compile(r"(?:^|[._])(?:model_)?ema(?:[._]|$)|^averaged_model|_ema$|^ema")


@dataclass(frozen=True)
class StateDict:
    """One set of tensors found in a file: where it was, whether it is an EMA copy, names without wrappers.

    `is_main`: who saved the file deploys this one, although it is an EMA copy.
    """

    place: str
    is_ema: bool
    tensors: Mapping[str, Tensor]
    is_main: bool = False


@dataclass(frozen=True)
class Contents:
    """All that a file holds: its state dicts in the order found, and what it says of the classes."""

    state_dicts: tuple[StateDict, ...]
    class_names: tuple[str, ...] | None


def read_file(path: Path) -> Contents:
    """Every state dict in a `.pth`, `.pt`, `.pth.tar` or `.safetensors` file, memory-mapped where the format allows.

    The format is told by the file's first bytes, not by its name. Tensors that were saved on a GPU come to the CPU.

    Raises:
        CheckpointError: there is no such file, it is empty, truncated, no checkpoint, or wants code executed.
    """
    raw, metadata = _read_raw(path)
    found: list[StateDict] = []
    _collect(raw, "", found, set())
    if isinstance(raw, Mapping) and "ema_state_dict" in raw and "mmengine_version" in _meta(raw):
        # mmengine's EMAHook swaps the two when it saves: `state_dict` is what is averaged and deployed.
        # https://github.com/open-mmlab/mmengine/blob/main/mmengine/hooks/ema_hook.py
        swap = {"state_dict": True, "ema_state_dict": False}
        found = [replace(s, is_ema=swap.get(s.place, s.is_ema), is_main=s.place == "state_dict") for s in found]
    return Contents(tuple(found), _class_names(raw, metadata))


def _meta(raw: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """What OpenMMLab notes beside the weights."""
    meta = raw.get("meta")
    return meta if isinstance(meta, Mapping) else {}


def _read_raw(path: Path) -> tuple[Any, Mapping[str, str]]:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a directory", "give the checkpoint file inside it")
        if not path.exists():
            raise CheckpointError(f"there is no file {path}", "check the path; random weights are never taken instead")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "check the file's permissions") from error
    if not head:
        raise CheckpointError(f"{path} is empty", "download or copy it again")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head[:2] == b"PK":
        return _read_zip(path), {}
    if head[:1] == b"\x80":
        return _read_pickle(path, mmap=False), {}
    what = "a Git LFS pointer, not the file itself" if head.startswith(b"version https:") else "no checkpoint"
    what = "an ONNX graph or another protobuf" if head[:1] == b"\x08" else what
    raise CheckpointError(f"{path} is {what}", "a checkpoint is a .pth, .pt, .pth.tar or .safetensors file")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is a truncated or damaged safetensors file ({error})", "download or copy it again"
        ) from error


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error) as error:
        raise _damaged(path, error) from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, not a state dict",
            "save the state dict of the model it was made from: torch.save(model.state_dict(), 'ckpt.pth')",
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a zip archive without a checkpoint in it", "unpack it and give the checkpoint inside"
        )
    # torch maps what lies in the file, compressed or not.
    return _read_pickle(path, mmap=is_stored)


def _read_pickle(path: Path, mmap: bool) -> Any:
    # Plain containers that training scripts save beside the weights; none of them runs code when it is built.
    with torch.serialization.safe_globals([argparse.Namespace, *_numpy_scalars()]), warnings.catch_warnings():
        # Of unusual pickle protocols and old kinds of storage; what counts is whether the tensors can be read.
        warnings.simplefilter("ignore")
        try:
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            # By that name torch would take the file for what its ending says.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # Torch's own text is not shown: it tells how to switch this protection off.
            if "eights only load failed" not in str(error):
                raise _damaged(path, error) from error
            wanted = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
            what = (
                f"{path} wants the code {wanted[1]} executed to be loaded"
                if wanted is not None
                else f"{path} is no state dict that torch has saved: a pickle of another kind, or damaged"
            )
            raise CheckpointError(what + "; that is refused", _TO_SAFETENSORS.replace("FILE", str(path))) from error
        except Exception as error:
            # A damaged pickle is a program gone wrong: there is hardly an exception that it cannot end in.
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(f"{path} is truncated or damaged ({reason})", "download or copy it again")


def _numpy_scalars() -> list[Any]:
    import numpy as np

    # What numpy itself pickles a scalar with; the module that holds it has moved between versions.
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    # Files written by numpy 1 call it numpy.core…, those by numpy 2 numpy._core….
    return [
        np.dtype,
        *kinds,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]


def _collect(value: Any, place: str, found: list[StateDict], seen: set[int]) -> None:
    if not isinstance(value, Mapping):
        return
    tensors = {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, Tensor)}
    if any("." in key for key in tensors):
        found += _split_copies(tensors, place)
        return
    if id(value) in seen:
        # A pickle may well contain itself.
        return
    seen.add(id(value))
    for key, item in value.items():
        if isinstance(key, str) and place.count(".") < 4:
            _collect(item, f"{place}.{key}" if place else key, found, seen)


def _split_copies(tensors: Mapping[str, Tensor], place: str) -> list[StateDict]:
    """The plain weights and the EMA copy in one dict of tensors, each where there is one, under unwrapped names.

    Names without `module.`, `model.`, …; a clash of two names keeps both as they are.
    """
    copies: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
    for key, tensor in tensors.items():
        name, is_ema = _unwrap(key)
        if "." not in name and tensor.numel() == 1:
            # What averaging counts beside the weights: `n_averaged` of torch, `steps` of mmengine.
            continue
        copy = copies[is_ema or bool(_EMA.search(place))]
        copy[key if name in copy else name] = tensor
    return [StateDict(place, is_ema, copy) for is_ema, copy in copies.items() if copy]


def _unwrap(key: str) -> tuple[str, bool]:
    """A tensor's name without the wrappers in front of it, and whether one of them is that of an EMA copy."""
    is_ema = False
    while True:
        first, dot, rest = key.partition(".")
        averaged = _EMA.search(first) is not None
        is_ema = is_ema or averaged
        if not dot or not (averaged or first in _WRAPPERS):
            return key, is_ema
        key = rest


def _class_names(raw: Any, metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    if not isinstance(raw, Mapping):
        return None
    dataset = _meta(raw).get("dataset_meta")
    places = [_parse_metadata(metadata), raw, _meta(raw), dataset if isinstance(dataset, Mapping) else {}]
    for place in places:
        for key in ("class_names", "CLASSES", "classes"):
            names = place.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return None


def _parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The class names in the metadata of a safetensors file, if they are JSON; others write there what they like."""
    try:
        return {"class_names": json.loads(metadata.get("class_names", "null"))}
    except (json.JSONDecodeError, RecursionError):
        return {}
