"""The classifier among the tensors that are not the blocks': a linear layer under any name, or what is one.

A head is a chain of linear layers, 1×1 convolutions after the pooling, and BNs. Names do not tell activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.checkpoints.matching import FoundNet
from repvgg_deploy.checkpoints.stored import StoredTensor
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable

HEAD_WORDS = re.compile(r"(^|[._])(head|fc\d*|linear|classifier|cls|logits|last_layer)([._]|\d|$)")
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_BN = frozenset(("running_mean", "running_var"))

Load = Callable[[str], NDArray[Any]]


@dataclass(frozen=True)
class HeadPart:
    """A module of a head: a `linear` layer, which may be a 1×1 convolution, or a `bn`; `keys` by the tensor's name."""

    name: str
    kind: str
    inputs: int
    outputs: int
    keys: Mapping[str, str]


@dataclass(frozen=True)
class Head:
    """The modules between the pooled features and the logits, in the order of execution; none: the net has no head."""

    parts: tuple[HeadPart, ...] = ()

    @property
    def classes(self) -> int:
        """How many logits there are; 0 without a head."""
        return self.parts[-1].outputs if self.parts else 0

    @property
    def keys(self) -> tuple[str, ...]:
        """All names of the head's tensors."""
        return tuple(key for part in self.parts for key in part.keys.values())


def find_head(net: FoundNet, features: int, rest: Mapping[str, StoredTensor]) -> Head:
    """The head of `net`, whose blocks give `features` channels, among the tensors `rest`.

    It is looked for under the net's own prefix first, then under each shorter one.

    Raises:
        CheckpointError: several layers could be the classifier, or the layer of the layout's own name does not fit.
    """
    parts = _group(rest)
    named = _named_head(net, features, parts, rest)
    if named is not None:
        return _with_norms(named, parts, features)
    for scope in scopes_of(net):
        inside = [part for part in parts if not scope or part.name.startswith(f"{scope}.")]
        linear = [part for part in inside if part.kind == "linear" and not is_beside_the_net(part.name)]
        fitting = [part for part in linear if part.inputs == features]
        titled = [part for part in fitting if HEAD_WORDS.search(part.name.removeprefix(scope))]
        if fitting and _is_chain(linear, features):
            return _with_norms(tuple(linear), inside, features)
        if len(titled) == 1:
            return _with_norms((titled[0],), inside, features)
        if len(titled or fitting) > 1:
            names = ", ".join(printable(part.name) for part in (titled or fitting)[:4])
            raise CheckpointError(
                f"{len(titled or fitting)} layers could be the classifier: {names}",
                "only nets with one output can be exported: save its state_dict() without the other heads",
            )
    return Head()


def scopes_of(net: FoundNet) -> list[str]:
    """The net's own prefix in its place, and each shorter one."""
    words = net.keys.prefix.removesuffix(".").split(".") if net.keys.prefix else []
    return [".".join(words[:n]) for n in range(len(words), -1, -1)]


def _named_head(
    net: FoundNet, features: int, parts: list[HeadPart], rest: Mapping[str, StoredTensor]
) -> tuple[HeadPart, ...] | None:
    """The linear layer that has the layout's own name, if a tensor of it is there."""
    for scope in scopes_of(net):
        name = f"{scope}.{net.keys.layout.head}" if scope else net.keys.layout.head
        found = next((part for part in parts if part.name == name), None)
        if found is not None and found.kind == "linear":
            if found.inputs != features:
                shape = rest[found.keys["weight"]].shape
                raise CheckpointError(
                    f"shapes contradict each other: {printable(name)}.weight is {shape}, and the net gives {features}"
                    " features",
                    "the file is damaged, or belongs to another net",
                )
            if "bias" not in found.keys:
                raise CheckpointError(f"1 tensor is missing: {printable(name)}.bias", "the file may be incomplete")
            return (found,)
        if f"{name}.weight" in rest:
            problem = rest[f"{name}.weight"].problem
            if problem is not None:
                raise CheckpointError(f"{printable(name)}.weight {problem}", "save the weights as plain tensors")
            shape = rest[f"{name}.weight"].shape
            if 0 in shape or not shape:
                raise CheckpointError(f"{printable(name)}.weight is empty: its shape is {shape}", "the file is damaged")
            raise CheckpointError(
                f"shapes contradict each other: {printable(name)}.weight is {shape}, expected that of a linear layer",
                "the file is damaged, or belongs to another net",
            )
        if f"{name}.bias" in rest:
            raise CheckpointError(f"1 tensor is missing: {printable(name)}.weight", "the file may be incomplete")
    return None


def _group(tensors: Mapping[str, StoredTensor]) -> list[HeadPart]:
    """The linear layers, 1×1 convolutions and BNs among the tensors, in the file's order."""
    modules: dict[str, dict[str, str]] = {}
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        if leaf in _LEAVES:
            modules.setdefault(module, {})[leaf] = key
    parts = []
    for name, keys in modules.items():
        shape = tensors[keys["weight"]].shape if "weight" in keys else ()
        if _BN.issubset(keys) and len(tensors[keys["running_mean"]].shape) == 1:
            width = tensors[keys["running_mean"]].shape[0]
            parts.append(HeadPart(name, "bn", width, width, keys))
        elif (len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))) and 0 not in shape:
            parts.append(HeadPart(name, "linear", shape[1], shape[0], keys))
    return parts


def _is_chain(linear: list[HeadPart], features: int) -> bool:
    """Whether each layer takes what the one before it gives, in the file's order, all in one module."""
    widths = [features, *(part.outputs for part in linear)]
    parents = {part.name.rpartition(".")[0] for part in linear}
    return len(parents) == 1 and all(part.inputs == width for part, width in zip(linear, widths, strict=False))


def _with_norms(chain: tuple[HeadPart, ...], parts: list[HeadPart], features: int) -> Head:
    """The chain with the BNs around its layers, which have the same parent and the widths that are there."""
    parent = chain[0].name.rpartition(".")[0]
    head: list[HeadPart] = []
    width = features
    for part in parts:
        if part in chain:
            head.append(part)
            width = part.outputs
        elif part.kind == "bn" and part.name.rpartition(".")[0] == parent and part.inputs == width:
            head.append(part)
    return Head(tuple(head))


_BESIDE = re.compile(
    r"(^|[._])\w*(loss|criterion|metric|aux|queue|teacher|projector|projection|predictor|momentum|memory|meter|accuracy|"
    r"center|prototype|temperature|logit_scale|log_var|normaliz|preprocess|augment|optimizer|discriminator)\w*([._]|$)",
    re.IGNORECASE,
)


def is_beside_the_net(name: str) -> bool:
    """Whether a tensor has a name of what training needs, and inference does not."""
    return _BESIDE.search(name) is not None


# What is not finite is found in the result.
@np.errstate(all="ignore")
def fold_linear_chain(parts: Iterable[HeadPart], load: Load) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weight (outputs, inputs) and bias of the one linear layer that a chain without activations is, in float64.

    A BN is y = γ(x − μ)/√(σ²+ε) + β: a diagonal matrix and a bias; ε is 1e-5, as torch's BatchNorm1d has it.
    """
    weight: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None
    for part in parts:
        if part.kind == "bn":
            matrix, shift = _bn_as_linear(part, load)
        else:
            matrix = load(part.keys["weight"]).astype(np.float64).reshape(part.outputs, -1)
            shift = load(part.keys["bias"]).astype(np.float64) if "bias" in part.keys else np.zeros(len(matrix))
        if weight is None or bias is None:
            weight, bias = matrix, shift
        else:
            weight, bias = matrix @ weight, matrix @ bias + shift
    if weight is None or bias is None:
        raise ValueError("the chain has no layers")
    return weight, bias


def _bn_as_linear(part: HeadPart, load: Load) -> tuple[NDArray[Any], NDArray[Any]]:
    values = {leaf: load(key).astype(np.float64) for leaf, key in part.keys.items() if leaf != "num_batches_tracked"}
    scale = 1 / np.sqrt(values["running_var"] + 1e-5) * values.get("weight", 1.0)
    return np.diag(scale), values.get("bias", 0.0) - values["running_mean"] * scale
