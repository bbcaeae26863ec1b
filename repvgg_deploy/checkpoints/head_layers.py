"""What stands between the linear layers of a head, and the layers that are left once all else is folded into them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from repvgg_deploy.checkpoints.heads import Head, HeadPart
from repvgg_deploy.checkpoints.inert import Inert, attributes_of
from repvgg_deploy.checkpoints.settings_values import as_activation
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable

HeadActivation = Literal["relu", "none"]
Group = tuple[HeadPart, ...]

# What does nothing when the net runs.
_SILENT = ("Dropout", "Identity", "Flatten", "AlphaDropout", "Dropout1d", "Dropout2d")


def group_layers(head: Head, modules: Mapping[str, Inert], given: HeadActivation | None) -> tuple[Group, ...]:
    """The parts of a head between its ReLUs: each group is one linear layer.

    Where the modules were pickled they tell what is between the layers. Names tell that nothing is, where they are
    consecutive numbers; a number that is missing is a module without tensors, a ReLU or a dropout.

    Args:
        head: with one linear layer or several.
        modules: the records of the modules, by name.
        given: what the user says is between the layers.

    Raises:
        CheckpointError: nothing tells what is between two layers, or it is something else than a ReLU.
    """
    parts = list(head.parts)
    if sum(part.kind == "linear" for part in parts) <= 1:
        return (head.parts,) if parts else ()
    known = _from_modules(parts, modules)
    if known is None:
        known = _from_names(parts, given)
    groups: list[list[HeadPart]] = [[]]
    for part, activation in zip(parts, [*known, "none"], strict=True):
        groups[-1].append(part)
        if activation == "relu":
            groups.append([])
    if any(all(part.kind == "bn" for part in group) for group in groups):
        raise CheckpointError(
            f"the head ends with a ReLU before {printable(groups[-1][0].name) if groups[-1] else 'nothing'}",
            "only heads whose last layer is linear are exported; --module exports a net by its own code",
        )
    return tuple(tuple(group) for group in groups)


def _from_modules(parts: list[HeadPart], modules: Mapping[str, Inert]) -> list[HeadActivation] | None:
    """What the pickled `Sequential` has after each part but the last; None without one."""
    parent = modules.get(parts[0].name.rpartition(".")[0])
    if parent is None or parent.name != "Sequential":
        return None
    names = [part.name.rpartition(".")[2] for part in parts]
    behind: list[HeadActivation] = []
    inside = False
    for name, child in attributes_of(attributes_of(parent).get("_modules")).items():
        if name in names:
            behind.append("none")
            inside = True
        elif inside and isinstance(child, Inert) and child.name not in _SILENT:
            activation = _activation(child)
            if activation not in ("relu", None):
                raise CheckpointError(
                    f"the head has the activation {activation}", "--module exports a net by its own code"
                )
            behind[-1] = "relu" if activation == "relu" else behind[-1]
    return behind[:-1]


def _from_names(parts: list[HeadPart], given: HeadActivation | None) -> list[HeadActivation]:
    words = [part.name.rpartition(".")[2] for part in parts]
    numbers = [int(word) for word in words] if all(word.isdigit() for word in words) else []
    behind: list[HeadActivation] = ["none"] * (len(parts) - 1)
    linear = [index for index, part in enumerate(parts) if part.kind == "linear"]
    for first, second in pairwise(linear):
        gaps = [n for n in range(first, second) if numbers and numbers[n + 1] - numbers[n] > 1]
        if numbers and not gaps:
            continue
        if given is None or len(gaps) > 1:
            raise CheckpointError(
                f"{printable(parts[first].name)} and {printable(parts[second].name)} are two layers of the classifier,"
                " and names do not tell the activation between them",
                "say it: --head-act relu, or none (a dropout is none)"
                if not gaps[1:]
                else "there is more than one module between them: --module exports a net by its own code",
            )
        # Without numbers: after the BN, as is usual.
        behind[gaps[0] if gaps else second - 1] = given
    return behind


def _activation(module: Inert) -> str | None:
    """The name of the activation that a record is of; None for another module."""
    if module.module != "torch.nn.modules.activation":
        return None
    return as_activation({"type": module.name, **attributes_of(module)})
