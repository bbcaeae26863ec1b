"""The algebra of fusing: convolutions, BNs, scales and sums of the same input, added up to one kernel and one bias.

In float64: t = γ/√(σ²+ε); W = Σ over branches t·K, a smaller kernel and the identity at the centre of the largest one;
b = Σ(β − μt). A BN after the sum scales both by its own t: W ← tW, b ← β + t(b − μ).
Float64, because t is large where σ is small, and β − μt is then a difference of large numbers.
Sources: RepVGG section 3.3 (https://arxiv.org/abs/2101.03697); QARepVGG section 4 (https://arxiv.org/abs/2212.01593).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg_deploy.errors import FusionError


@dataclass(frozen=True)
class Input:
    """The block's input itself."""


@dataclass(frozen=True)
class Convolved:
    """A convolution of the block's input."""

    conv: nn.Conv2d


@dataclass(frozen=True)
class Normalized:
    """A batch norm of `value`, as in evaluation; `norm` is a torch BN or a frozen one."""

    value: Affine
    norm: nn.Module


@dataclass(frozen=True)
class Scaled:
    """`value` times a factor per channel, or one for all channels."""

    value: Affine
    factor: Tensor


@dataclass(frozen=True)
class Summed:
    """The sum of several values."""

    values: tuple[Affine, ...]


Affine: TypeAlias = Input | Convolved | Normalized | Scaled | Summed
"""A value that is affine in the block's input and never mixes pixels but by a convolution of that input."""

ALL_ROWS = slice(None)


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a batch norm: torch's, a synchronized one, or a frozen one of torchvision or detectron2.

    One with an activation inside, as timm has them, is more than that.
    """
    plain = all(isinstance(child, nn.Identity) for child in module.children())
    return plain and (isinstance(module, _BatchNorm) or is_frozen_norm(module))


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether `module` holds a batch norm's tensors as buffers and is called frozen; its library is not imported."""
    tensors = {"weight", "bias", "running_mean", "running_var"}
    return "Frozen" in type(module).__name__ and tensors <= module._buffers.keys()


def norms_of(value: Affine) -> Iterator[nn.Module]:
    """The BNs of a value."""
    if isinstance(value, Normalized):
        yield value.norm
        yield from norms_of(value.value)
    elif isinstance(value, Scaled):
        yield from norms_of(value.value)
    elif isinstance(value, Summed):
        for part in value.values:
            yield from norms_of(part)


def sources_of(value: Affine) -> Iterator[nn.Conv2d | None]:
    """What each branch of a value takes of the input: a convolution of it, or None for the input itself."""
    if isinstance(value, Input):
        yield None
    elif isinstance(value, Convolved):
        yield value.conv
    elif isinstance(value, Summed):
        for part in value.values:
            yield from sources_of(part)
    else:
        yield from sources_of(value.value)


def largest_conv(value: Affine) -> nn.Conv2d:
    """The first convolution with the largest kernel; its geometry is that of the fused one."""
    return max((conv for conv in sources_of(value) if conv is not None), key=lambda conv: conv.kernel_size[0])


def kernel_and_bias(value: Affine, dtype: torch.dtype, rows: slice = ALL_ROWS) -> tuple[Tensor, Tensor]:
    """The kernel and bias of the output channels `rows`, differentiable with respect to what `value` holds."""
    total = _evaluate(value, dtype, rows, largest_conv(value))
    kernel = total.with_identity_in_kernel(rows).kernel
    assert kernel is not None
    return kernel, total.bias


@dataclass(frozen=True)
class _Map:
    """x ↦ kernel ∗ x + identity · x + bias for some output channels; `kernel` or `identity` is None if it is 0."""

    kernel: Tensor | None
    identity: Tensor | None
    bias: Tensor

    def scaled(self, factor: Tensor) -> _Map:
        kernel = None if self.kernel is None else self.kernel.mul_(factor[:, None, None, None])
        return _Map(kernel, None if self.identity is None else self.identity * factor, self.bias * factor)

    def added(self, other: _Map) -> _Map:
        """The sum of both; the kernel of this one, if it has one, is at least as large as that of `other`."""
        kernel = other.kernel if self.kernel is None else self.kernel
        if self.kernel is not None and other.kernel is not None:
            height, width = other.kernel.shape[2:]
            top, left = (self.kernel.shape[2] - height) // 2, (self.kernel.shape[3] - width) // 2
            self.kernel[:, :, top : top + height, left : left + width] += other.kernel
        identities = [part for part in (self.identity, other.identity) if part is not None]
        identity = reduce(torch.add, identities) if identities else None
        return _Map(kernel, identity, self.bias + other.bias)

    def with_identity_in_kernel(self, rows: slice) -> _Map:
        if self.kernel is None or self.identity is None:
            return self
        per_group, height, width = self.kernel.shape[1:]
        number = torch.arange(len(self.kernel), device=self.kernel.device)
        # A kernel's columns count from 0 within each group.
        channel = (number + (rows.start or 0)) % per_group
        self.kernel[number, channel, height // 2, width // 2] += self.identity
        return _Map(self.kernel, None, self.bias)


def _evaluate(value: Affine, dtype: torch.dtype, rows: slice, like: nn.Conv2d) -> _Map:
    if isinstance(value, Input):
        ones = torch.ones(like.out_channels, dtype=dtype, device=like.weight.device)[rows]
        return _Map(None, ones, torch.zeros_like(ones))
    if isinstance(value, Convolved):
        # A copy even in the same type: what follows scales it, and adds to it, in place.
        kernel = value.conv.weight[rows].to(dtype, copy=True)
        bias: Tensor | None = value.conv.bias
        return _Map(kernel, None, torch.zeros_like(kernel[:, 0, 0, 0]) if bias is None else bias[rows].to(dtype))
    if isinstance(value, Normalized):
        inner = _evaluate(value.value, dtype, rows, like)
        scale, shift = _scale_and_shift(value.norm, inner.bias, rows)
        scaled = inner.scaled(scale)
        return _Map(scaled.kernel, scaled.identity, shift + scaled.bias)
    if isinstance(value, Scaled):
        factor = value.factor.to(dtype).flatten().expand(like.out_channels)[rows]
        return _evaluate(value.value, dtype, rows, like).scaled(factor)
    # The largest kernel first: the others are added into it, so that no second tensor of its size is needed.
    parts = sorted(value.values, key=lambda part: -max(conv.kernel_size[0] if conv else 0 for conv in sources_of(part)))
    total = reduce(_Map.added, (_evaluate(part, dtype, rows, like) for part in parts))
    return total.with_identity_in_kernel(rows)


def _scale_and_shift(norm: nn.Module, like: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """What a BN does in evaluation, as (t, β − μt)."""
    tensors = (getattr(norm, name) for name in ("running_mean", "running_var", "weight", "bias"))
    mean, variance, weight, bias = (None if t is None else cast(Tensor, t)[rows].to(like.dtype) for t in tensors)
    assert mean is not None
    assert variance is not None
    # The oldest frozen BNs have no epsilon.
    scale = (variance + getattr(norm, "eps", 0.0)).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def require_one_convolution(value: Affine, name: str) -> None:
    """Raise FusionError if `value`, of the block `name`, is not one convolution of the input.

    A kernel k of padding p looks at input positions shifted by p − dilation·(k−1)/2 against the output's; branches can
    be added up only where that is 0 for each, and the strides are the same.
    """
    if any(norm.running_var is None for norm in norms_of(value)):
        raise FusionError(
            f"block {name}: a BN without running statistics depends on the batch",
            "train with track_running_stats=True",
        )
    geometry = largest_conv(value)
    for conv in sources_of(value):
        if conv is None:
            if geometry.stride != (1, 1) or geometry.in_channels != geometry.out_channels:
                raise FusionError(f"block {name}: an identity branch beside a convolution that changes the shape")
            continue
        if not _adds_up(conv, geometry):
            raise FusionError(
                f"block {name}: its branches do not look at the same pixels"
                f" (kernel {conv.kernel_size}, stride {conv.stride}, padding {conv.padding})",
                "kernels must be square and odd, padded with dilation·(kernel − 1)/2 zeros; stride, groups, channels"
                " and dilation the same in all branches",
            )


def _adds_up(conv: nn.Conv2d, geometry: nn.Conv2d) -> bool:
    padding = padding_of(conv)
    centred = all(2 * p == d * (k - 1) for p, d, k in zip(padding, conv.dilation, conv.kernel_size, strict=True))
    shapes = [(c.stride, c.groups, c.in_channels, c.out_channels) for c in (conv, geometry)]
    square = conv.kernel_size[0] == conv.kernel_size[1] and conv.kernel_size[0] % 2 == 1
    # The dilation of a single pixel is none.
    spread = conv.kernel_size[0] > 1 and conv.dilation != geometry.dilation
    return centred and square and not spread and shapes[0] == shapes[1] and conv.padding_mode == "zeros"


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """The zeros above and left of the image, also where the convolution names them `same` or `valid`."""
    if isinstance(conv.padding, str):
        whole = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return (whole[0], whole[1]) if conv.padding == "same" else (0, 0)
    return cast(tuple[int, int], tuple(conv.padding))
