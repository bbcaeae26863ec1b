"""An independent answer to what a checkpoint computes: the formula of the training form in float64, and nothing else.

Tensors are read by torch, safetensors and numpy, not by the reader under test; the forward pass is written from the
paper (https://arxiv.org/abs/2101.03697): each block is the sum of its branches, each with its own batch norm.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fuzzing.cases import UnreadableError

Tensors = Mapping[str, Tensor]
_EPSILON = 1e-5
_MOST_RELATIVE = 1e-3
_STAGES = range(1, 5)


def read_tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names, joined by dots over nested dicts.

    Raises:
        UnreadableError: its own library refuses the file.
    """
    try:
        return dict(_flatten("", _load(content), 0))
    except Exception as error:
        raise UnreadableError(f"{type(error).__name__}: {error}"[:200]) from error


def _load(content: bytes) -> Any:
    if content[8:9] == b"{":
        from safetensors.torch import load

        return load(content)
    if content[:2] == b"PK" and b".npy" in content:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name.replace("/", "."): _native(file[name]) for name in file.files}
    try:
        return torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except pickle.UnpicklingError:
        return _Arrays(io.BytesIO(content)).load()
    except RuntimeError:
        inner = _only_file(content)
        if inner is None:
            raise
        return _load(inner)


def _only_file(content: bytes) -> bytes | None:
    """The file that a zip archive holds and nothing else, as people zip a checkpoint that is itself a zip."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return None
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(archive.namelist()[0]) if len(archive.namelist()) == 1 else None


class _Arrays(pickle.Unpickler):
    """Reads pickles of NumPy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What numpy makes an array with; raise UnpicklingError for any other name."""
        parts = ("multiarray _reconstruct", "numpy ndarray", "numpy dtype")
        if f"{module.rpartition('.')[2]} {name}" not in parts or module.partition(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def _native(array: Any) -> Tensor:
    """An array of any byte order as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def _flatten(prefix: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value.detach()
    elif isinstance(value, np.ndarray):
        yield prefix, _native(value)
    elif isinstance(value, Mapping) and depth < 20:
        for key, item in value.items():
            if isinstance(key, str):
                yield from _flatten(f"{prefix}.{key}" if prefix else key, item, depth + 1)


def compute_logits(tensors: Tensors, images: Tensor) -> Tensor:
    """The logits in float64 of a net with the official code's names, in training or deploy form.

    Raises:
        UnreadableError: there is no such net, or its tensors do not fit each other.
    """
    stems = [key.removesuffix(ending) for key in tensors for ending in _STEM if key.endswith(ending)]
    if not stems:
        raise UnreadableError("no stem")
    prefix = min(stems, key=len)
    # Counters take no part in the logits, whatever they claim to be.
    parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        net = {key: value.double() for key, value in parts.items() if not key.endswith("num_batches_tracked")}
        with torch.no_grad():
            value = _run_block(net, "stage0", images.double(), 2)
            for stage in _STAGES:
                block = 0
                while any(key.startswith(f"stage{stage}.{block}.") for key in net):
                    value = _run_block(net, f"stage{stage}.{block}", value, 1 if block else 2)
                    block += 1
            return functional.linear(value.mean((2, 3)), net["linear.weight"], net["linear.bias"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise UnreadableError(f"{type(error).__name__}: {error}"[:200]) from error


_STEM = ("stage0.rbr_dense.conv.weight", "stage0.rbr_reparam.weight")


def _run_block(net: Tensors, name: str, value: Tensor, stride: int) -> Tensor:
    if f"{name}.rbr_reparam.weight" in net:
        weight, bias = net[f"{name}.rbr_reparam.weight"], net[f"{name}.rbr_reparam.bias"]
        return functional.conv2d(value, weight, bias, stride, 1, 1, value.shape[1] // weight.shape[1]).relu()
    dense, point = net[f"{name}.rbr_dense.conv.weight"], net[f"{name}.rbr_1x1.conv.weight"]
    groups = value.shape[1] // dense.shape[1]
    total = _normalize(net, f"{name}.rbr_dense.bn", functional.conv2d(value, dense, None, stride, 1, 1, groups))
    total = total + _normalize(net, f"{name}.rbr_1x1.bn", functional.conv2d(value, point, None, stride, 0, 1, groups))
    if f"{name}.rbr_identity.weight" in net:
        total = total + _normalize(net, f"{name}.rbr_identity", value)
    return total.relu()


def _normalize(net: Tensors, name: str, value: Tensor) -> Tensor:
    mean, variance, weight, bias = (
        net[f"{name}.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return (value - mean) / (variance + _EPSILON).sqrt() * weight + bias


def run_graph(path: Path, images: Tensor) -> Tensor:
    """What ONNX Runtime computes of a graph's file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.float().numpy()})
    return torch.from_numpy(logits)


def compare_logits(found: Tensor, wanted: Tensor) -> str | None:
    """What is wrong with logits, held against those in float64; None for nothing."""
    if found.shape != wanted.shape:
        return f"logits of shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    error = float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    return None if error <= _MOST_RELATIVE else f"logits differ by {error:.3g} relative"


def pictures() -> Tensor:
    """Two normalized inputs of 32 pixels, always the same."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(11))
