"""Which modules are RepVGG blocks in training form, and what they consist of.

The blocks of the official code, timm, OpenMMLab and Holocron are known by the names of their parts. Any other block is
known by what its forward does: `repvgg_deploy.fusion.tracing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from repvgg_deploy.errors import FusionError
from repvgg_deploy.fusion.algebra import (
    Affine,
    Convolved,
    Input,
    Normalized,
    Summed,
    is_norm,
    largest_conv,
    require_one_convolution,
)


@dataclass(frozen=True)
class BlockParts:
    """A training block of any library, taken apart: the value of all branches together, and what follows."""

    value: Affine
    se_before: nn.Module
    act: nn.Module
    se_after: nn.Module

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution with the largest kernel; its geometry is that of the fused one."""
        return largest_conv(self.value)


# How each library names the parts of its block: attributes, the main branch first.
@dataclass(frozen=True)
class _Naming:
    branches: tuple[str, ...]
    norm_after_sum: str | None = None
    se_before: str | None = None
    act: str = "act"
    se_after: str | None = None
    transparent: tuple[str, ...] = ()


# In this order: this project, the official code and QARepVGG's, timm, OpenMMLab. Stochastic depth (`drop_path`) does
# nothing in evaluation.
_NAMINGS = (
    _Naming(("branch_3x3", "branch_1x1", "branch_identity"), "bn", "se_before", "act", "se_after"),
    _Naming(("rbr_dense", "rbr_1x1", "rbr_identity"), "bn", "se", "nonlinearity", "post_se"),
    _Naming(("conv_kxk", "conv_1x1", "identity"), None, "attn", "act", None, ("drop_path",)),
    _Naming(("branch_3x3", "branch_1x1", "branch_norm"), None, "se_layer", "act"),
)


def take_apart_by_name(block: nn.Module, name: str) -> BlockParts | None:
    """The parts of a training block with the names of a known library, or None if `block` is something else.

    Raises:
        FusionError: it has the names of a RepVGG block, and no equivalent convolution.
    """
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
    values = [_branch(branch) for branch in branches]
    if any(value is None for value in values):
        return None
    whole = Summed(tuple(value for value in values if value is not None))
    require_one_convolution(whole, name)
    return BlockParts(whole, nn.Identity(), cast(nn.Module, block._modules["activation"]), nn.Identity())


def _named_parts(block: nn.Module, naming: _Naming, name: str) -> BlockParts | None:
    main = _branch(cast(nn.Module, _child(block, naming.branches[0])))
    if main is None or not _has_conv(main):
        # Another network's block with the same name for its main branch, as MobileOne's in timm.
        return None
    values = [main]
    for attribute in naming.branches[1:]:
        branch = _child(block, attribute)
        if branch is None:
            continue
        value = _branch(branch)
        if value is None:
            raise FusionError(f"block {name}: its branch {attribute!r} is not a convolution, BN or identity")
        values.append(value)
    norm = _child(block, naming.norm_after_sum)
    se_before = _child(block, naming.se_before) or nn.Identity()
    if norm is not None and not is_norm(norm) and not isinstance(norm, nn.Identity):
        return None
    whole: Affine = Summed(tuple(values))
    if norm is not None and is_norm(norm):
        if not isinstance(se_before, nn.Identity):
            raise FusionError(
                f"block {name}: a squeeze-excite stands between the branches and the BN after their sum",
                "such a QARepVGG block has no equivalent convolution; train it without the squeeze-excite",
            )
        whole = Normalized(whole, norm)
    for attribute in _unknown_parts(block, naming):
        raise FusionError(
            f"block {name} has a part {attribute!r} that no RepVGG block has",
            "it would be lost by fusing; remove it, or fuse the block by hand",
        )
    require_one_convolution(whole, name)
    act = cast(nn.Module, _child(block, naming.act))
    return BlockParts(whole, se_before, act, _child(block, naming.se_after) or nn.Identity())


def _has_conv(value: Affine) -> bool:
    return isinstance(value, Convolved) or (isinstance(value, Normalized) and _has_conv(value.value))


def _branch(branch: nn.Module) -> Affine | None:
    """A convolution, a BN, one after the other, or neither; None if the branch holds anything else."""
    value: Affine = Input()
    leaves = list(branch.children()) if list(branch.children()) and not is_norm(branch) else [branch]
    for leaf in leaves:
        if isinstance(leaf, nn.Conv2d) and isinstance(value, Input):
            value = Convolved(leaf)
        elif is_norm(leaf) and not isinstance(value, Normalized):
            value = Normalized(value, leaf)
        elif not isinstance(leaf, nn.Identity | nn.Dropout):
            return None
    return value
