"""Fusing: each RepVGG block becomes one convolution with the same output.

In float64: t = γ/√(σ²+ε); W = Σ over branches t·K, the 1×1 kernel and the identity at the centre of the k×k one;
b = Σ(β − μt). A BN after the sum scales both by its own t: W ← tW, b ← β + t(b − μ).
Sources: RepVGG section 3.3 (https://arxiv.org/abs/2101.03697); QARepVGG section 4 (https://arxiv.org/abs/2212.01593).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Event, Lock
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg_deploy.errors import FusionError
from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, TrainingBlock


@dataclass(frozen=True)
class BlockParts:
    """A training block of any library, taken apart: (convolution or None, BN or None) a branch, and what follows."""

    branches: tuple[tuple[nn.Conv2d | None, _BatchNorm | None], ...]
    norm_after_sum: _BatchNorm | None
    se_before: nn.Module
    act: nn.Module
    se_after: nn.Module

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution with the largest kernel; its geometry is that of the fused one."""
        convs = [conv for conv, _ in self.branches if conv is not None]
        return max(convs, key=lambda conv: conv.kernel_size[0])


def fuse(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `module` in which each RepVGG block is one equivalent convolution; the rest is copied as it is.

    The blocks of this package, of the official code (RepVGGplus and QARepVGG as well), of timm, of OpenMMLab and of
    Holocron are recognized by their parts; the libraries need not be installed. `module` itself is not changed.

    Args:
        module: any module that contains RepVGG blocks, or is one.
        dtype: of the fused weights; by default that of the block's own. The algebra is float64 in any case.

    Raises:
        FusionError: a block has no equivalent convolution (no running statistics, a squeeze-excite in front of a BN,
            padding that shifts the branches against each other, a branch that is not known), or there is none at all.
    """
    fusion = begin_fusion(module, dtype)
    fusion.finish()
    return fusion.net


class Fusion:
    """A net that is being fused: `net` has its final form at once, the values of its kernels come with `finish`."""

    def __init__(self, net: nn.Module, fills: Mapping[str, Callable[[], None]]) -> None:
        self.net = net
        self._fills = fills
        self._done = {name: Event() for name in fills}
        self._lock = Lock()

    def finish(self) -> None:
        """Compute the kernels block by block, in the order of the net; again it does nothing, beside it it waits."""
        with self._lock:
            try:
                for name, fill in self._fills.items():
                    fill()
                    self._done[name].set()
            finally:
                # After an error too, so that nobody waits for ever.
                for event in self._done.values():
                    event.set()
                self._fills = {}

    def wait_for(self, tensor: str) -> None:
        """Return when the tensor of that name in `net` has its values, which another thread computes."""
        event = self._done.get(tensor.rsplit(".", 2)[0])
        if event is not None:
            event.wait()


def begin_fusion(module: nn.Module, dtype: torch.dtype | None = None) -> Fusion:
    """As `fuse`, but the kernels are not computed yet; `module` must stay as it is until they are."""
    # deepcopy takes what it finds in the memo for the copy: so a block's branches are never copied.
    memo: dict[int, object] = {}
    fills: dict[str, Callable[[], None]] = {}
    found = False
    for name, block in module.named_modules():
        parts = _take_apart(block, name)
        if parts is not None:
            if not isinstance(block, TrainingBlock):
                _require_same_function(block, parts, name)
            memo[id(block)], fills[name] = _fused_block(parts, dtype, training=block.training)
            found = True
        found = found or isinstance(block, FusedBlock)
    if not found:
        raise FusionError(
            f"{type(module).__name__} has no RepVGG block in training form",
            "fuse() knows the blocks of RepVGG, RepVGGplus, QARepVGG, timm, OpenMMLab and Holocron",
        )
    fused: nn.Module = copy.deepcopy(module, memo)
    if isinstance(fused, RepVGG):
        fused.spec = fused.spec.fused()
        if dtype is not None:
            fused = fused.to(dtype)
    return Fusion(fused, fills)


def equivalent_kernel_bias(block: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The one kernel (out, in/groups, k, k) and bias (out) that do what all branches of `block` do together.

    Differentiable with respect to the block's parameters. The BNs are taken as in evaluation.

    Raises:
        FusionError: `block` is no RepVGG block in training form, or has no equivalent convolution.
    """
    parts = _take_apart(block, type(block).__name__)
    if parts is None:
        raise FusionError(f"{type(block).__name__} is no RepVGG block in training form")
    return _kernel_and_bias(parts, dtype)


def _kernel_and_bias(parts: BlockParts, dtype: torch.dtype, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The kernel and bias of the output channels `rows`."""
    per_group, size = parts.conv.weight.shape[1:3]
    center = size // 2
    # The largest kernel first: the others are added into it, so that no second tensor of its size is needed.
    ordered = sorted(parts.branches, key=lambda branch: branch[0] is not parts.conv)
    kernel, bias = _scaled(parts.conv, ordered[0][1], dtype, rows)
    for conv, norm in ordered[1:]:
        if conv is None:
            out = torch.arange(parts.conv.out_channels, device=kernel.device)[rows]
            scale, shift = _affine(norm, bias, rows)
            kernel[torch.arange(len(out), device=out.device), out % per_group, center, center] += scale
        else:
            weight, shift = _scaled(conv, norm, dtype, rows)
            inner = slice(center - weight.shape[2] // 2, center + weight.shape[2] // 2 + 1)
            kernel[:, :, inner, inner] += weight
        bias = bias + shift
    if parts.norm_after_sum is not None:
        scale, shift = _affine(parts.norm_after_sum, bias, rows)
        kernel, bias = kernel * scale[:, None, None, None], bias * scale + shift
    return kernel, bias


def _scaled(conv: nn.Conv2d, norm: _BatchNorm | None, dtype: torch.dtype, rows: slice) -> tuple[Tensor, Tensor]:
    """A convolution and the BN behind it, as a kernel and a bias."""
    weight = conv.weight[rows].to(dtype, copy=True)
    scale, shift = _affine(norm, weight[:, 0, 0, 0], rows)
    if conv.bias is not None:
        shift = shift + conv.bias[rows].to(dtype) * scale
    return weight.mul_(scale[:, None, None, None]), shift


def _affine(norm: _BatchNorm | None, like: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """What a BN does in evaluation, as (t, β − μt); (1, 0) where there is none."""
    if norm is None:
        return torch.ones_like(like), torch.zeros_like(like)
    mean = cast(Tensor, norm.running_mean)[rows].to(like.dtype)
    variance = cast(Tensor, norm.running_var)[rows].to(like.dtype)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight[rows].to(like.dtype)
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias[rows].to(like.dtype)


def _fused_block(parts: BlockParts, dtype: torch.dtype | None, training: bool) -> tuple[FusedBlock, Callable[[], None]]:
    """The block, and what fills its convolution with values."""
    like = parts.conv
    with torch.device("meta"):
        conv = nn.Conv2d(
            like.in_channels,
            like.out_channels,
            cast(tuple[int, int], like.kernel_size),
            cast(tuple[int, int], like.stride),
            cast(tuple[int, int], like.padding),
            cast(tuple[int, int], like.dilation),
            like.groups,
        )
    weight = torch.empty_like(like.weight, dtype=dtype, memory_format=torch.contiguous_format)
    bias = torch.empty_like(weight[:, 0, 0, 0], memory_format=torch.contiguous_format)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    rest = [copy.deepcopy(part) for part in (parts.se_before, parts.act, parts.se_after)]

    @torch.no_grad()
    def fill() -> None:
        # A few output channels at a time: float64 copies of a whole kernel would be the largest tensors of an export.
        step = max(1, _CHUNK // max(1, weight[0].numel()))
        for start in range(0, like.out_channels, step):
            rows = slice(start, start + step)
            weight[rows], bias[rows] = _kernel_and_bias(parts, torch.float64, rows)

    return FusedBlock(conv, *rest).train(training), fill


@torch.no_grad()
def _require_same_function(block: nn.Module, parts: BlockParts, name: str) -> None:
    """Nothing, where the fused block does what `block` does; its parts alone do not tell what its forward does.

    Raises:
        FusionError: on random input they differ, or `block` does not run on it.
    """
    conv = parts.conv
    if conv.weight.is_meta:
        return
    twin = copy.deepcopy(block).eval().double()
    size = 2 * conv.dilation[0] * (conv.kernel_size[0] // 2) + 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, conv.in_channels, size, size, dtype=torch.float64, generator=generator).to(conv.weight.device)
    fused, fill = _fused_block(parts, torch.float64, training=False)
    fill()
    fused = fused.double()
    try:
        expected, given = twin(x.clone()), fused(x)
        same = expected.shape == given.shape and torch.allclose(expected, given, rtol=1e-9, atol=1e-9)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise FusionError(f"block {name} does not run on a batch of images: {str(error).splitlines()[0]}") from error
    if not same:
        raise FusionError(
            f"block {name} ({type(block).__name__}) has the parts of a RepVGG block, and does something else with them",
            "a hook, a parameter or a forward of its own changes its output; fuse it by hand",
        )


# Values of a kernel that are in float64 at a time: few enough for the second-level cache, and enough for torch to split
# an operation among threads and for the interpreter, which other threads want too, to be asked for seldom.
_CHUNK = 1 << 18


# How each library names the parts of its block. `branches` are (attribute, is it the identity), the rest attributes.
@dataclass(frozen=True)
class _Naming:
    branches: tuple[str, ...]
    norm_after_sum: str | None = None
    se_before: str | None = None
    act: str = "act"
    se_after: str | None = None
    transparent: tuple[str, ...] = ()


_NAMINGS = (
    _Naming(("branch_3x3", "branch_1x1", "branch_identity"), "bn", "se_before", "act", "se_after"),
    _Naming(("rbr_dense", "rbr_1x1", "rbr_identity"), "bn", "se", "nonlinearity", "post_se"),
    _Naming(("conv_kxk", "conv_1x1", "identity"), None, "attn", "act", None, ("drop_path",)),
    _Naming(("branch_3x3", "branch_1x1", "branch_norm"), None, "se_layer", "act"),
)


def _take_apart(block: nn.Module, name: str) -> BlockParts | None:
    """The parts of a training block, or None where `block` is something else."""
    holocron = block._modules.get("branches")
    if isinstance(holocron, nn.ModuleList) and "activation" in block._modules:
        return _holocron_parts(block, holocron, name)
    fitting = [n for n in _NAMINGS if _child(block, n.branches[0]) is not None and _child(block, n.act) is not None]
    if not fitting:
        return None
    # Two libraries share some names: the one that knows the most of the block's parts is meant.
    return _named_parts(block, min(fitting, key=lambda naming: len(_unknown_parts(block, naming))), name)


def _unknown_parts(block: nn.Module, naming: _Naming) -> list[str]:
    known = {*naming.branches, *naming.transparent}
    known |= {n for n in (naming.norm_after_sum, naming.se_before, naming.act, naming.se_after) if n is not None}
    return [name for name, part in block.named_children() if name not in known and not isinstance(part, nn.Identity)]


def _child(block: nn.Module, name: str | None) -> nn.Module | None:
    return block._modules.get(name) if name else None


def _holocron_parts(block: nn.Module, branches: nn.ModuleList, name: str) -> BlockParts | None:
    pairs = [_conv_and_norm(branch) for branch in branches]
    if any(pair is None for pair in pairs):
        return None
    parts = BlockParts(
        tuple(pair for pair in pairs if pair is not None),
        None,
        nn.Identity(),
        cast(nn.Module, block._modules["activation"]),
        nn.Identity(),
    )
    return _checked(parts, name)


def _named_parts(block: nn.Module, naming: _Naming, name: str) -> BlockParts | None:
    pairs = []
    for attribute in naming.branches:
        branch = _child(block, attribute)
        if branch is None:
            continue
        pair = _conv_and_norm(branch)
        if pair is not None:
            pairs.append(pair)
        elif attribute == naming.branches[0]:
            # Another network's block with the same name for its main branch, as MobileOne's in timm.
            return None
        else:
            raise FusionError(f"block {name}: its branch {attribute!r} is no convolution, BN or identity")
    if pairs[0][0] is None:
        return None
    norm = _child(block, naming.norm_after_sum)
    se_before = _child(block, naming.se_before) or nn.Identity()
    if norm is not None and not isinstance(norm, _BatchNorm | nn.Identity):
        return None
    if isinstance(norm, _BatchNorm) and not isinstance(se_before, nn.Identity):
        raise FusionError(
            f"block {name}: a squeeze-excite stands between the branches and the BN after their sum",
            "such a QARepVGG block has no equivalent convolution; train it without the squeeze-excite",
        )
    for attribute in _unknown_parts(block, naming):
        raise FusionError(
            f"block {name} has a part {attribute!r} that no RepVGG block has",
            "it would be lost by fusing; remove it, or fuse the block by hand",
        )
    parts = BlockParts(
        tuple(pairs),
        norm if isinstance(norm, _BatchNorm) else None,
        se_before,
        cast(nn.Module, _child(block, naming.act)),
        _child(block, naming.se_after) or nn.Identity(),
    )
    return _checked(parts, name)


def _conv_and_norm(branch: nn.Module) -> tuple[nn.Conv2d | None, _BatchNorm | None] | None:
    """A branch as (convolution, BN), either of them None; None where it holds anything else."""
    conv: nn.Conv2d | None = None
    norm: _BatchNorm | None = None
    leaves = [branch] if not list(branch.children()) or isinstance(branch, _BatchNorm) else list(branch.children())
    for leaf in leaves:
        if isinstance(leaf, nn.Conv2d) and conv is None and norm is None:
            conv = leaf
        elif isinstance(leaf, _BatchNorm) and norm is None:
            norm = leaf
        elif not isinstance(leaf, nn.Identity | nn.Dropout):
            return None
    return conv, norm


def _checked(parts: BlockParts, name: str) -> BlockParts:
    """`parts`, if the sum of its branches is one convolution.

    A kernel k of padding p looks at input positions shifted by p − dilation·(k−1)/2 against the output's; the
    branches can be added up only where that is 0 for each, and the strides are the same.
    """
    geometry = parts.conv
    norms = [norm for _, norm in parts.branches] + [parts.norm_after_sum]
    if any(norm is not None and norm.running_var is None for norm in norms):
        raise FusionError(
            f"block {name}: a BN without running statistics depends on the batch",
            "train with track_running_stats=True",
        )
    for conv, _ in parts.branches:
        if conv is None:
            if geometry.stride != (1, 1) or geometry.in_channels != geometry.out_channels:
                raise FusionError(f"block {name}: an identity branch beside a convolution that changes the shape")
            continue
        centred = all(
            isinstance(p, int) and 2 * p == d * (k - 1)
            for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=False)
        )
        shapes = [(c.stride, c.groups, c.in_channels, c.out_channels) for c in (conv, geometry)]
        square = conv.kernel_size[0] == conv.kernel_size[1] and conv.kernel_size[0] % 2 == 1
        # The dilation of a single pixel is none.
        spread = conv.kernel_size[0] > 1 and conv.dilation != geometry.dilation
        if not centred or not square or spread or shapes[0] != shapes[1] or conv.padding_mode != "zeros":
            raise FusionError(
                f"block {name}: its branches do not look at the same pixels"
                f" (kernel {conv.kernel_size}, stride {conv.stride}, padding {conv.padding})",
                "kernels must be square and odd, padded with dilation·(kernel − 1)/2 zeros; stride, groups, channels"
                " and dilation the same in all branches",
            )
    return parts
