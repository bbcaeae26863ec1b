"""What a pickle of whole modules says of the net, which a state dict does not: strides, activation, BN epsilon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repvgg_deploy.checkpoints.inert import Inert, attributes_of
from repvgg_deploy.checkpoints.matching import FoundNet
from repvgg_deploy.checkpoints.plain_trees import as_tree
from repvgg_deploy.checkpoints.settings_values import as_activation, as_number
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.nets.settings import StructureOptions

_KERNELS = (".branch_3x3.conv.weight", ".conv.weight")


def read_modules(modules: Mapping[str, Inert], net: FoundNet) -> StructureOptions:
    """The structure of `net` by the attributes of its pickled modules; nothing where it was no pickle of modules.

    Raises:
        CheckpointError: a convolution is dilated, a later block of a stage is strided, or activations differ.
    """
    parents = {name: net.full_name(key).rpartition(".")[0] for key, name in net.keys.names.items()}
    kernels = {name: parent for name, parent in parents.items() if name.endswith(_KERNELS) and parent in modules}
    strides: dict[int, int] = {}
    for name, parent in kernels.items():
        _, stage, block, _ = name.split(".", 3)
        geometry = attributes_of(modules[parent])
        stride = _single(geometry.get("stride"))
        if _single(geometry.get("dilation")) not in (None, 1):
            raise CheckpointError(f"{parent} is a dilated convolution", "only nets without dilation can be exported")
        if stride is not None and int(block) == 0:
            # Of all branches of a block the stride is the same; fusing would fail otherwise.
            strides[int(stage)] = stride
        elif stride not in (None, 1):
            raise CheckpointError(f"{parent} has stride {stride}", "only a stage's first block may have a stride")
    stages = range(len(strides))
    return StructureOptions(
        tuple(strides[stage] for stage in stages) if strides and set(strides) == set(stages) else None,
        _activation(modules, net),
        _epsilon(modules, parents),
    )


def _single(value: Any) -> int | None:
    """The one number of a pair of equal ones."""
    pair = value if isinstance(value, list | tuple) else (value,)
    return pair[0] if pair and isinstance(pair[0], int) and all(item == pair[0] for item in pair) else None


def _activation(modules: Mapping[str, Inert], net: FoundNet) -> str | None:
    """That of the blocks: a module of torch that is a direct part of a block, not one inside a squeeze-excite."""
    blocks = _block_names(net)
    found = {
        as_activation(as_tree(record))
        for name, record in modules.items()
        if record.module.startswith("torch.nn.modules.activation") and name.rpartition(".")[0] in blocks
    }
    if len(found) > 1:
        raise CheckpointError(
            f"the blocks have several activations: {', '.join(sorted(map(str, found)))}", "they must all be the same"
        )
    return found.pop() if found else None


def _block_names(net: FoundNet) -> set[str]:
    """The name of each block: what the names of its tensors begin with."""
    tensors: dict[tuple[str, str], list[list[str]]] = {}
    fused = set()
    for key, canonical in net.keys.names.items():
        _, stage, block, part = canonical.split(".", 3)
        tensors.setdefault((stage, block), []).append(net.full_name(key).split("."))
        if part == "conv.bias":
            fused.add((stage, block))
    names = set()
    for block_key, keys in tensors.items():
        shared = [words[0] for words in zip(*keys, strict=False) if len(set(words)) == 1]
        # Of a fused block without a squeeze-excite all tensors are one convolution's.
        is_convolution = block_key in fused and all(len(words) - 1 == len(shared) for words in keys)
        names.add(".".join(shared[:-1] if is_convolution else shared))
    return names


def _epsilon(modules: Mapping[str, Inert], parents: Mapping[str, str]) -> float | None:
    found = {
        as_number(attributes_of(modules[parent]).get("eps"), 1e-12, 0.1)
        for name, parent in parents.items()
        if name.endswith(".running_var") and parent in modules
    }
    return found.pop() if len(found) == 1 else None
