"""A second device that computes on the CPU and refuses operators on tensors of both, as a GPU does and stricter.

CUDA takes a CPU tensor of no dimensions beside its own. It then divides by multiplying with a reciprocal, which rounds
another way: so that is refused here as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SECOND = torch.device("meta")
"""What tensors of the device say of themselves: torch has this name everywhere, and nothing else here uses it."""


_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# A GPU takes indices from the CPU.
_TAKE_INDICES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class MixedDevices(AssertionError):
    """An operator was given tensors of two devices."""


class OnSecond(Tensor):
    """A tensor of the second device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnSecond:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=SECOND
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        del tensor_contents
        return f"OnSecond({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    compared = (args[0], *args[2:]) if func in _TAKE_INDICES else args
    here: set[bool] = set()
    for tensor in _tensors((*compared, *kwargs.values())):
        if type(tensor) is Tensor and tensor.device == SECOND:
            raise AssertionError(f"{func} of a tensor that this device did not make")
        here.add(type(tensor) is OnSecond)
    if len(here) > 1 and func not in _MOVES:
        raise MixedDevices(f"{func} of {[(type(t).__name__, tuple(t.shape)) for t in _tensors(args)]}")
    on_second = True in here
    if kwargs.get("device") is not None:
        on_second = torch.device(kwargs["device"]).type == SECOND.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = func(*map(_unwrap, args), **{name: _unwrap(value) for name, value in kwargs.items()})
    if func._schema.is_mutable:
        # In place: the caller keeps its own tensor.
        return kwargs.get("out", args[0])
    return _wrap(inner) if on_second else inner


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _wrap(value: Any) -> Any:
    if isinstance(value, Tensor):
        return OnSecond(value)
    return type(value)(map(_wrap, value)) if isinstance(value, list | tuple) else value


def _unwrap(value: Any) -> Any:
    if type(value) is OnSecond:
        return value.inner
    return type(value)(map(_unwrap, value)) if isinstance(value, list | tuple) else value


class _Factories(TorchDispatchMode):
    """Operators that make a tensor from nothing go to the device that they name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return _run(func, args, kwargs or {})


class _FromValues(TorchFunctionMode):
    """Tensors of Python's numbers, which torch makes without asking a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device, learns = kwargs.pop("device"), kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(device).requires_grad_(learns)
        if func is Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1], dtype=torch.long), *args[2:])
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[None]:
    """Inside the block tensors can be made on `SECOND` and moved to it and back."""
    with _Factories(), _FromValues():
        yield


def to_second(module: nn.Module) -> nn.Module:
    """`module` with its parameters and buffers moved to the second device, in place."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(OnSecond(parameter.detach()), requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, OnSecond(buffer))
    return module


def to_first(module: nn.Module) -> nn.Module:
    """`module` with its parameters and buffers moved back, in place."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(_unwrap(parameter.detach()), requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, _unwrap(buffer))
    return module
