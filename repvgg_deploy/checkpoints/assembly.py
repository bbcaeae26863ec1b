"""A net's tensors, read and checked: exactly those that its architecture has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.checkpoints.architecture import name_nearest
from repvgg_deploy.checkpoints.choice import Choice
from repvgg_deploy.checkpoints.head_layers import Group, HeadActivation, group_layers
from repvgg_deploy.checkpoints.heads import Head, find_head, fold_linear_chain, is_beside_the_net, scopes_of
from repvgg_deploy.checkpoints.layout import KeyMap, Layout
from repvgg_deploy.checkpoints.matching import FoundNet
from repvgg_deploy.checkpoints.stored import StoredTensor
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable
from repvgg_deploy.nets.cards import describe
from repvgg_deploy.nets.spec import ArchSpec, tensor_shapes

_FREE_BYTES = 64 << 20
_MAX_EXPANSION = 24
"""Tensors may take this many times the file's size, beyond the first 64 MiB: shared and repeated numbers are rare."""
_MAX_IN_CHANNELS = 256


@dataclass(frozen=True)
class Assembled:
    """The tensors under canonical names, the architecture with its classes, and what a user should know of them."""

    spec: ArchSpec
    arrays: Mapping[str, NDArray[Any]]
    notes: tuple[str, ...]


def assemble(
    spec: ArchSpec, chosen: Choice, file_size: int, head_activation: HeadActivation | None = None
) -> Assembled:
    """The net of `spec`, the blocks' architecture, from the chosen net's tensors and all that are in its place.

    `head_activation`: what the user says is between the layers of a head that has several.

    Raises:
        CheckpointError: tensors are missing or surplus, shapes contradict each other, values are not finite, a variance
            is negative, a tensor is damaged, or what the tensors claim is beyond all measure for the file's size.
    """
    net, tensors = chosen.net, chosen.tensors
    keys = net.keys
    left = {key: t for key, t in tensors.items() if key not in keys.names and not _is_ignored(net, key)}
    head = find_head(net, spec.features, left)
    _require_head(head, tensors, keys.layout)
    groups = group_layers(head, chosen.modules, head_activation)
    spec = replace(spec, classes=head.classes, hidden=tuple(group[-1].outputs for group in groups[:-1]))
    left = {key: tensor for key, tensor in left.items() if key not in head.keys}
    beside = [key for key in left if _is_beside(key, net, _scope_of(head, net), left)]
    _require_complete(spec, keys, tensors, [key for key in left if key not in set(beside)])
    used = {canonical: key for key, canonical in keys.names.items() if not keys.layout.is_ignored(key)}
    _require_modest(spec, [tensors[key] for key in (*used.values(), *head.keys)], file_size)
    wide = _common_type(tensors, [*used.values(), *head.keys])
    loaded = {name: tensors[key].load(printable(key)).astype(wide, copy=False) for name, key in used.items()}
    loaded |= _load_head(groups, tensors, wide)
    _check_values(loaded, keys, head)
    return Assembled(spec, loaded, (*_training_notes(net, tensors), *_head_notes(head, net), *_beside_notes(beside)))


def _load_head(
    groups: tuple[Group, ...], tensors: Mapping[str, StoredTensor], dtype: np.dtype[Any]
) -> dict[str, NDArray[Any]]:
    def load(key: str) -> NDArray[Any]:
        return tensors[key].load(printable(key))

    loaded: dict[str, NDArray[Any]] = {}
    names = [*(f"hidden.{number}" for number in range(len(groups) - 1)), "classifier"]
    for name, parts in zip(names, groups, strict=False):
        first = parts[0]
        if len(parts) == 1 and "bias" in first.keys:
            weight, bias = load(first.keys["weight"]).reshape(first.outputs, -1), load(first.keys["bias"])
        else:
            weight, bias = fold_linear_chain(parts, load)
        # Float64 beyond float32's range becomes infinite, which the check of all values finds.
        with np.errstate(over="ignore"):
            loaded |= {
                f"{name}.weight": weight.astype(dtype, copy=False),
                f"{name}.bias": bias.astype(dtype, copy=False),
            }
    return loaded


def _is_ignored(net: FoundNet, key: str) -> bool:
    return net.keys.layout.is_ignored(key.removeprefix(net.keys.prefix))


def require_arrays(keys: KeyMap, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError unless each tensor of the net is an array of numbers."""
    for key in keys.names:
        _require_array(key, tensors[key], keys.layout)


def _require_array(key: str, tensor: StoredTensor, layout: Layout) -> None:
    shown = printable(key)
    if tensor.problem is not None:
        raise CheckpointError(f"{shown} {tensor.problem}", "save the weights as plain tensors, before quantization")
    if not layout.is_ignored(key) and (tensor.ndim == 0 or tensor.numel() == 0):
        raise CheckpointError(f"{shown} is empty: its shape is {tensor.shape}", "the file is damaged")


def _require_head(head: Head, tensors: Mapping[str, StoredTensor], layout: Layout) -> None:
    """Raise CheckpointError unless each tensor of the head is an array of floats as long as its layer is wide."""
    for part in head.parts:
        for leaf, key in part.keys.items():
            if leaf == "num_batches_tracked":
                continue
            tensor = tensors[key]
            _require_array(key, tensor, layout)
            if not tensor.dtype.is_float:
                raise CheckpointError(
                    f"{printable(key)} is not a floating-point tensor", "give the checkpoint before quantization"
                )
            if (leaf != "weight" or part.kind == "bn") and tensor.shape != (part.outputs,):
                raise CheckpointError(
                    f"shapes contradict each other: {printable(key)} is {tensor.shape}, expected ({part.outputs},)",
                    "the file is damaged, or belongs to another net",
                )


def _require_complete(spec: ArchSpec, keys: KeyMap, found: Mapping[str, StoredTensor], strange: list[str]) -> None:
    """Raise CheckpointError unless the blocks' tensors are just those of `spec`, and none is `strange`."""
    expected = tensor_shapes(spec)
    tensors = {canonical: found[key] for key, canonical in keys.names.items() if not keys.layout.is_ignored(key)}
    missing = [keys.file_key(name) for name in expected if name not in tensors]
    surplus = [keys.file_key(name) for name in tensors if name not in expected]
    surplus += strange
    if missing:
        are = "tensor is" if len(missing) == 1 else "tensors are"
        raise CheckpointError(f"{len(missing)} {are} missing: {_some(missing, surplus)}", _incomplete(spec))
    if surplus:
        do = "tensor does" if len(surplus) == 1 else "tensors do"
        raise CheckpointError(
            f"{len(surplus)} {do} not belong to the net: {_some(surplus, [keys.file_key(n) for n in expected])}",
            "they would be lost; remove them from the file if they are not needed",
        )
    wrong = [
        f"{printable(keys.file_key(name))} is {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(f"shapes contradict each other: {'; '.join(wrong[:3])}", _incomplete(spec))
    whole = [keys.file_key(name) for name, tensor in tensors.items() if not tensor.dtype.is_float]
    if whole:
        raise CheckpointError(
            f"{printable(whole[0])} is not a floating-point tensor", "give the checkpoint before quantization"
        )


def _scope_of(head: Head, net: FoundNet) -> str:
    """What is before all names of the net, the head's too, with a dot at its end; or nothing."""
    scopes = [f"{scope}." if scope else "" for scope in scopes_of(net)]
    return next(scope for scope in scopes if all(key.startswith(scope) for key in head.keys))


def _is_beside(key: str, net: FoundNet, scope: str, left: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor that is neither a block's nor the head's can be left out without the net missing it."""
    if not key.startswith(scope):
        return True
    inner = key.removeprefix(net.keys.prefix if key.startswith(net.keys.prefix) else scope)
    words = inner.split(".")
    if words[0] in {segment.words[0] for segment in net.keys.layout.segments}:
        return False
    if is_beside_the_net(inner):
        return True
    module, _, leaf = key.rpartition(".")
    if leaf not in ("weight", "bias", "running_mean", "running_var"):
        # A buffer, or a parameter without a module of its own.
        return net.keys.layout.vocabulary.isdisjoint(words)
    has_statistics = f"{module}.running_var" in left
    # A lone vector, such as a weight for each class of a loss, is not a layer; a matrix or a BN may be one that is
    # missed.
    return not has_statistics and max(left[k].ndim for k in (f"{module}.weight", key) if k in left) <= 1


def _require_modest(spec: ArchSpec, tensors: Iterable[StoredTensor], file_size: int) -> None:
    claimed = sum(tensor.numel() * max(tensor.dtype.itemsize, 4) for tensor in tensors)
    if claimed > _FREE_BYTES + _MAX_EXPANSION * file_size:
        raise CheckpointError(
            f"the tensors claim {claimed} bytes, but the file has {file_size}",
            "save the weights as plain tensors, each number once",
        )
    if spec.in_channels > _MAX_IN_CHANNELS:
        raise CheckpointError(
            f"the net takes {spec.in_channels} channels, but images have at most {_MAX_IN_CHANNELS}",
            "the file is damaged, or is not an image classifier",
        )


def _common_type(tensors: Mapping[str, StoredTensor], keys: Iterable[str]) -> np.dtype[Any]:
    return np.dtype(np.float64 if any(tensors[key].dtype.name == "float64" for key in keys) else np.float32)


def _incomplete(spec: ArchSpec) -> str:
    return f"by its tensors the file is {describe(spec)} with {spec.classes} classes; it may be incomplete"


def _some(names: list[str], candidates: list[str]) -> str:
    return ", ".join(name_nearest(name, candidates) for name in names[:3]) + (", …" if len(names) > 3 else "")


def _training_notes(net: FoundNet, tensors: Mapping[str, StoredTensor]) -> list[str]:
    dropped = [k for k in tensors if _is_ignored(net, k) and not k.endswith(".num_batches_tracked")]
    if not dropped:
        return []
    return [f"{len(dropped)} tensors that are needed only for training were left out ({printable(dropped[0])}, …)"]


def _beside_notes(beside: list[str]) -> list[str]:
    if not beside:
        return []
    names = ", ".join(printable(key) for key in beside[:3]) + (", …" if len(beside) > 3 else "")
    tensors = "1 tensor outside the net was" if len(beside) == 1 else f"{len(beside)} tensors outside the net were"
    return [f"{tensors} left out: {names}"]


def _head_notes(head: Head, net: FoundNet) -> list[str]:
    if not head.parts:
        return ["the net has no classifier: its output is the pooled features"]
    names = [part.name for part in head.parts]
    if len(names) == 1 and (names[0] == net.keys.layout.head or names[0].endswith(f".{net.keys.layout.head}")):
        return []
    return [f"the classifier is {', '.join(map(printable, names))}"]


def _check_values(arrays: Mapping[str, NDArray[Any]], keys: KeyMap, head: Head) -> None:
    for name, array in arrays.items():
        low = float(array.min()) if name.endswith("running_var") else 0.0
        if _is_finite(array) and low >= 0:
            continue
        leaf = name.rpartition(".")[2]
        shown = head.parts[-1].keys.get(leaf, name) if not name.startswith("stages.") else keys.file_key(name)
        if low < 0:
            raise CheckpointError(
                f"{printable(shown)} has a negative variance ({low:g})", "the file is damaged, or was averaged wrongly"
            )
        raise CheckpointError(
            f"{printable(shown)} contains NaN or Inf", "the training diverged; take an earlier checkpoint"
        )


def _is_finite(array: NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        # In one pass and without a mask: a sum is finite only where all its values are.
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())
