"""The inputs and outputs of a whole network: their names, sizes and values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repvgg_deploy.errors import DeployError

Example = Tensor | Sequence[Tensor]
"""The inputs of a module: one tensor, or several in the order of its forward."""


def as_tuple(example: Example) -> tuple[Tensor, ...]:
    """The inputs as a tuple of tensors on the CPU.

    Raises:
        DeployError: they are something else.
    """
    tensors = (example,) if isinstance(example, Tensor) else tuple(example)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise DeployError(
            "the example is not a tensor or a tuple of tensors", "give the inputs of the module's forward"
        )
    return tuple(tensor.detach().cpu() for tensor in tensors)


def input_names_of(module: nn.Module, count: int) -> tuple[str, ...]:
    """The names of the first `count` parameters of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [name for name, item in inspect.signature(module.forward).parameters.items() if item.kind in kinds]
    return tuple(found[:count]) if len(found) >= count else tuple(f"input_{index}" for index in range(count))


def with_a_batch(
    tensors: tuple[Tensor, ...], names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]
) -> tuple[Tensor, ...]:
    """`tensors`, twice in a batch where that is to be dynamic and is 1: torch takes a dimension of 1 as fixed."""
    return tuple(
        torch.cat([tensor, tensor]) if 0 in dynamic.get(name, {}) and len(tensor) == 1 else tensor
        for name, tensor in zip(names, tensors, strict=True)
    )


@torch.no_grad()
def run_module(module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    """What a module gives; it may change its inputs in place, so it gets copies."""
    return module(*(tensor.clone() for tensor in tensors))


def leaves(outputs: Any) -> list[tuple[Any, Tensor]]:
    """The tensors of a module's output, each with where it is."""
    pairs = [(path, leaf) for path, leaf in pytree.tree_flatten_with_path(outputs)[0] if leaf is not None]
    if not pairs or not all(isinstance(leaf, Tensor) for _, leaf in pairs):
        raise DeployError("the module's output is not made of tensors", "give tensors, or tuples or dicts of them")
    return pairs


def output_names_of(outputs: Any, given: Sequence[str] | None) -> tuple[str, ...]:
    """The names given for a module's outputs, or names by their keys.

    Raises:
        DeployError: there are more or fewer names than outputs.
    """
    found = leaves(outputs)
    if given is not None:
        if len(given) != len(found):
            raise DeployError(f"{len(given)} output names for {len(found)} outputs", "give one name per output")
        return tuple(given)
    if len(found) == 1 and not found[0][0]:
        return ("output",)
    keys = ["_".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path) for path, _ in found]
    return tuple(f"output_{key}" if key[:1].isdigit() else key for key in keys)


def of_another_size(
    tensors: Sequence[Tensor], names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]
) -> tuple[Tensor, ...]:
    """Random inputs in the range of the example's, of another size in what is dynamic; whole numbers are drawn anew."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for name, tensor in zip(names, tensors, strict=True):
        places = dynamic.get(name, {})
        # Sizes that most nets' strides divide.
        shape = [
            size if place not in places else size + 1 if place == 0 else size + max(32, size // 2 // 32 * 32)
            for place, size in enumerate(tensor.shape)
        ]
        if tensor.is_floating_point():
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            spread = tensor.double().std() if tensor.numel() > 1 else torch.tensor(1.0)
            made.append((noise * (spread if spread > 0 else 1.0) + tensor.double().mean()).to(tensor.dtype))
        else:
            chosen = torch.randint(tensor.numel(), shape, generator=generator)
            made.append(tensor.flatten()[chosen])
    return tuple(made)


def require_other_size(module: nn.Module, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise DeployError if `module` does not run where a dimension said to be dynamic is another one."""
    try:
        run_module(module, tensors)
    except RuntimeError as error:
        given = ", ".join(f"{n} {'x'.join(map(str, t.shape))}" for n, t in zip(names, tensors, strict=True))
        raise DeployError(
            f"{type(module).__name__} does not run on inputs of another size: {given}: {str(error).splitlines()[0]}",
            "leave out of `dynamic` what the module fixes",
        ) from error


def cast(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """`tensors` with those of floating point in `dtype`; None leaves them."""
    return tuple(tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for tensor in tensors)
