"""Fusing: each RepVGG block becomes one convolution with the same output; see `algebra` for how, `blocks` for which."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import cast, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from repvgg_deploy.errors import FusionError
from repvgg_deploy.fusion.algebra import kernel_and_bias, padding_of
from repvgg_deploy.fusion.blocks import BlockParts, take_apart_by_name
from repvgg_deploy.fusion.tracing import take_apart_by_tracing
from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, TrainingBlock


@overload
def fuse(module: RepVGG, dtype: torch.dtype | None = None) -> RepVGG: ...
@overload
def fuse(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module: ...
def fuse(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `module` in which each RepVGG block is one equivalent convolution; the rest is copied as it is.

    A block is any module that sums branches of its input, of which each is a convolution, a batch norm (also a
    synchronized or frozen one), a factor per channel, or the input itself: the blocks of RepVGG, RepVGGplus, QARepVGG,
    MobileOne, YOLOv6 and YOLOv7, in timm, OpenMMLab, Holocron or of one's own; of any kernel size, dilation, stride and
    number of groups. The libraries need not be installed. `module` itself is not changed; wrappers of data parallelism
    and `torch.compile` are left out of the copy. Run it on a net that is loaded, in any mode; BNs are taken as in
    evaluation.

    Args:
        module: any module that contains RepVGG blocks, or is one.
        dtype: of the fused weights; by default that of the block's own. The algebra is float64 in any case.

    Raises:
        FusionError: a block has no equivalent convolution (no running statistics, a squeeze-excite before a BN,
            padding that shifts the branches against each other, a branch that is unknown), or there is none at all.

    Example:
        >>> from repvgg_deploy import build, fuse, load_checkpoint
        >>> deploy = fuse(build(load_checkpoint("net.pth")))
        >>> [name for name, _ in deploy.get_submodule("stages.0.0").named_parameters()]
        ['conv.weight', 'conv.bias']
    """
    module = _unwrap(module)
    # deepcopy takes what it finds in the memo for the copy: so a block's branches are never copied.
    memo: dict[int, object] = {}
    blocks = find_blocks(module)
    for name, (block, parts) in blocks.items():
        # Of this package's own blocks the forward is known; any other may do more than its parts tell.
        if not isinstance(block, TrainingBlock):
            _require_same_function(block, parts, name)
        fused_block = _fused_block(parts, dtype, training=block.training)
        memo[id(block)] = _with_plain_attributes(fused_block, block)
    if not blocks and not any(isinstance(block, FusedBlock) for block in module.modules()):
        raise FusionError(
            f"{type(module).__name__} has no RepVGG block in training form",
            "a block sums branches of its input, among them a convolution, each with its BN, before its activation",
        )
    _unwrap_inside(module, memo)
    fused: nn.Module = copy.deepcopy(module, memo)
    if isinstance(fused, RepVGG):
        fused.spec = fused.spec.fused()
        if dtype is not None:
            fused = fused.to(dtype)
    return fused


def fuse_in_place(net: RepVGG) -> RepVGG:
    """`net` itself, made its float32 deploy form: the fused kernels take the place of the 3×3 kernels in memory.

    For a net that nobody else uses, nor its checkpoint's tensors. Memory that a process has not used before costs more
    than the algebra of fusing: on a virtual machine several times as much. Where tensors of the net share memory, as a
    checkpoint may have them, the fused kernels get their own.

    Raises:
        FusionError: see `fuse`.
    """
    own_memory = _has_memory_of_its_own(net)
    for name, (block, parts) in find_blocks(net).items():
        stage, _, index = name.rpartition(".")
        fused_block = _fused_block(parts, torch.float32, block.training, in_place=own_memory)
        cast(nn.Sequential, net.get_submodule(stage))[int(index)] = fused_block
    net.spec = net.spec.fused()
    return net.to(torch.float32)


def _has_memory_of_its_own(net: nn.Module) -> bool:
    """Whether no two tensors of `net` lie on the same bytes, and each is without gaps."""
    tensors = [tensor for tensor in net.state_dict().values() if tensor.nbytes]
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    apart = all(end <= start for (_, end), (start, _) in pairwise(spans))
    return apart and all(tensor.is_contiguous() for tensor in tensors)


def find_blocks(module: nn.Module) -> dict[str, tuple[nn.Module, BlockParts]]:
    """The RepVGG blocks in training form inside `module`, by name: each with its parts, in the order of definition.

    A block of one branch counts where others of its class have several, as MobileOne's first ones of a stage.

    Raises:
        FusionError: one of them has no equivalent convolution.
    """
    found: dict[str, tuple[nn.Module, BlockParts]] = {}
    if isinstance(module, RepVGG):
        # Its blocks have names, and nothing else in it is one: there is no need to look at what each part does.
        parts_of = ((name, block, take_apart_by_name(block, name)) for name, block in module.named_blocks())
        return {name: (block, parts) for name, block, parts in parts_of if parts is not None}
    known: set[type[nn.Module]] = set()
    alone: list[tuple[str, nn.Module]] = []
    inside = "/"
    for name, block in module.named_modules():
        if name.startswith(inside):
            # A part of a block may look like a block itself.
            continue
        parts = take_apart(block, name)
        if parts is None:
            alone.append((name, block))
            continue
        found[name] = block, parts
        known.add(type(block))
        inside = f"{name}." if name else ""
    for name, block in alone:
        single = take_apart_by_tracing(block, name, fewest=1) if type(block) in known else None
        if single is not None:
            found[name] = block, single
    order = {name: number for number, (name, _) in enumerate(module.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def take_apart(block: nn.Module, name: str) -> BlockParts | None:
    """The parts of a block in training form, known by its names or by what it does; None for any other module.

    Raises:
        FusionError: it is a RepVGG block without an equivalent convolution.
    """
    return take_apart_by_name(block, name) or take_apart_by_tracing(block, name)


def equivalent_kernel_bias(block: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The one kernel (out, in/groups, k, k) and bias (out) that do what all branches of `block` do together.

    Differentiable with respect to the block's parameters. The BNs are taken as in evaluation.

    Raises:
        FusionError: `block` is not a RepVGG block in training form, or has no equivalent convolution.

    Example:
        >>> from repvgg_deploy import build, equivalent_kernel_bias, load_checkpoint
        >>> net = build(load_checkpoint("net.pth"))
        >>> kernel, bias = equivalent_kernel_bias(net.get_submodule("stages.0.0"))
        >>> kernel.dtype, kernel.shape[2:]
        (torch.float64, torch.Size([3, 3]))
    """
    parts = take_apart(block, type(block).__name__)
    if parts is None:
        raise FusionError(f"{type(block).__name__} is not a RepVGG block in training form")
    return kernel_and_bias(parts.value, dtype)


def _unwrap(module: nn.Module) -> nn.Module:
    """The net inside wrappers of data parallelism and of `torch.compile`."""
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif _is_compiled(module):
            module = module.get_submodule("_orig_mod")
        else:
            return module


def _is_compiled(module: nn.Module) -> bool:
    # `torch.compile`'s class; importing it would import the compiler.
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def _unwrap_inside(module: nn.Module, memo: dict[int, object]) -> None:
    """Put plain modules into the copy where parts of `module` are compiled, whose code is that of the training form."""
    compiled = [part for part in module.modules() if _is_compiled(part)]
    for part in reversed(compiled):
        # From the innermost on: the copy of an outer part then takes those of its parts from the memo.
        memo[id(part)] = copy.deepcopy(part.get_submodule("_orig_mod"), memo)


def _with_plain_attributes(fused: FusedBlock, block: nn.Module) -> FusedBlock:
    """`fused` with those attributes of `block` that are plain values: a net such as YOLO's reads them of its layers."""
    for key, value in vars(block).items():
        plain = isinstance(value, bool | int | float | str | list | tuple) and not key.startswith("_")
        if plain and key not in vars(fused):
            setattr(fused, key, copy.deepcopy(value))
    return fused


@torch.no_grad()
def _fused_block(parts: BlockParts, dtype: torch.dtype | None, training: bool, in_place: bool = False) -> FusedBlock:
    like = parts.conv
    # The fused values come next: nothing is allocated or drawn for them here.
    with torch.device("meta"):
        conv = nn.Conv2d(
            like.in_channels,
            like.out_channels,
            cast(tuple[int, int], like.kernel_size),
            cast(tuple[int, int], like.stride),
            padding_of(like),
            cast(tuple[int, int], like.dilation),
            like.groups,
        )
    if in_place and like.weight.dtype == dtype:
        # Each output channel of the fused kernel is made of the same one of the branches.
        weight = like.weight.detach()
    else:
        weight = torch.empty_like(like.weight, dtype=dtype, memory_format=torch.contiguous_format)
    bias = torch.empty_like(weight[:, 0, 0, 0], memory_format=torch.contiguous_format)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    # A few output channels at a time: float64 copies of a whole kernel would be the largest tensors of an export.
    step = max(1, _CHUNK // max(1, weight[0].numel()))
    for start in range(0, like.out_channels, step):
        rows = slice(start, start + step)
        weight[rows], bias[rows] = kernel_and_bias(parts.value, torch.float64, rows)
    rest = [copy.deepcopy(part) for part in (parts.se_before, parts.act, parts.se_after)]
    return FusedBlock(conv, *rest).train(training)


@torch.no_grad()
def _require_same_function(block: nn.Module, parts: BlockParts, name: str) -> None:
    """Raise FusionError if the fused block and `block` differ on random input, or `block` does not run on it.

    The parts of a block alone do not tell what its forward does.
    """
    conv = parts.conv
    if conv.weight.is_meta:
        return
    twin = copy.deepcopy(block).eval().double()
    # The border on both sides, whose kernels reach into the padding, and three pixels whose kernels do not.
    size = 2 * conv.dilation[0] * (conv.kernel_size[0] // 2) + 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, conv.in_channels, size, size, dtype=torch.float64, generator=generator).to(conv.weight.device)
    fused = _fused_block(parts, torch.float64, training=False).double()
    try:
        expected, given = twin(x.clone()), fused(x)
        same = expected.shape == given.shape and torch.allclose(expected, given, rtol=1e-9, atol=1e-9)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise FusionError(f"block {name} does not run on a batch of images: {str(error).splitlines()[0]}") from error
    if not same:
        raise FusionError(
            f"block {name} ({type(block).__name__}) has the parts of a RepVGG block, but does something else with them",
            "a hook, a parameter or a forward of its own changes its output; fuse it by hand",
        )


# Values of a kernel that are in float64 at a time: few enough for the second-level cache, and enough for torch to split
# an operation among threads.
_CHUNK = 1 << 18
