"""The architecture that a set of canonically named tensors is: widths, groups, branches, strides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from repvgg_deploy.checkpoints.layout import KeyMap
from repvgg_deploy.checkpoints.stored import StoredTensor
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable
from repvgg_deploy.nets.spec import IDENTITY, ArchSpec, BlockSpec, SqueezeExcite

_MAX_CANDIDATES = 500

Parts = Mapping[str, StoredTensor]


def infer_spec(keys: KeyMap, tensors: Mapping[str, StoredTensor]) -> ArchSpec:
    """The architecture read from the blocks' tensors, without a classifier; no name and no card is asked.

    Strides leave no trace in a checkpoint. They follow the convention of all layouts: 2 at the first block of each
    stage, 1 elsewhere, except that a block with an identity branch has stride 1.

    Raises:
        CheckpointError: a block's kernel is missing, or cannot follow the block before it.
    """
    blocks = _group_by_block(keys, tensors)
    stages: list[list[BlockSpec]] = []
    channels = 0
    for (stage, index), parts in blocks.items():
        if index == 0:
            stages.append([])
        block = _infer_block(keys, tensors, stage, index, parts, channels)
        stages[-1].append(block)
        channels = block.out_channels
    for blocks_of_stage in stages:
        # A squeeze-excite that one block of a stage has is expected in all of it.
        known = next((block.squeeze_excite for block in blocks_of_stage if block.squeeze_excite), None)
        blocks_of_stage[:] = [replace(b, squeeze_excite=b.squeeze_excite or known) for b in blocks_of_stage]
    return ArchSpec(tuple(tuple(stage) for stage in stages), 0)


def _group_by_block(keys: KeyMap, tensors: Parts) -> dict[tuple[int, int], dict[str, StoredTensor]]:
    """The tensors of each block by their name inside it, blocks in the order of execution and without a gap."""
    blocks: dict[tuple[int, int], dict[str, StoredTensor]] = {}
    for key, canonical in keys.names.items():
        if canonical.startswith("stages."):
            _, s, b, part = canonical.split(".", 3)
            blocks.setdefault((int(s), int(b)), {})[part] = tensors[key]
    ordered: dict[tuple[int, int], dict[str, StoredTensor]] = {}
    for stage in range(1 + max(stage for stage, _ in blocks)):
        depth = 1 + max((index for number, index in blocks if number == stage), default=0)
        for index in range(depth):
            ordered[stage, index] = blocks.get((stage, index), {})
    return ordered


def _infer_block(
    keys: KeyMap, tensors: Mapping[str, StoredTensor], stage: int, index: int, parts: Parts, channels: int
) -> BlockSpec:
    is_fused = "conv.weight" in parts
    name = f"stages.{stage}.{index}.{'conv.weight' if is_fused else 'branch_3x3.conv.weight'}"
    kernel = parts.get(name.split(".", 3)[3])
    if kernel is None:
        unknown = [key for key in tensors if key not in keys.names]
        raise CheckpointError(
            f"1 tensor is missing: {name_nearest(keys.file_key(name), unknown)}",
            f"block {index} of stage {stage} has no kernel; the file may be incomplete",
        )
    if kernel.ndim != 4:
        raise CheckpointError(
            f"{keys.file_key(name)} is {tuple(kernel.shape)}, expected a kernel of four dimensions",
            "the file is damaged, or its kernels were reshaped",
        )
    width, per_group = kernel.shape[:2]
    # No layout has groups in its stem, so the stem's kernel tells the channels of the image.
    channels = channels or per_group
    groups, rest = divmod(channels, per_group)
    if rest or groups < 1 or width % groups:
        raise CheckpointError(
            f"shapes contradict each other: {keys.file_key(name)} is {tuple(kernel.shape)},"
            f" but the block before it outputs {channels} channels",
            "the file mixes two networks, or is damaged",
        )
    has_identity = any(part.startswith("branch_identity.") for part in parts)
    stride = 2 if index == 0 and not has_identity else 1
    can_skip = channels == width and stride == 1
    squeeze_excite = _infer_se(keys, parts)
    if is_fused:
        return BlockSpec(channels, width, stride, groups, (), False, squeeze_excite)
    layout = keys.layout
    branches = tuple(b for b in layout.branches if b.kernel != IDENTITY or can_skip)
    return BlockSpec(channels, width, stride, groups, branches, layout.norm_after_sum, squeeze_excite)


def name_nearest(name: str, candidates: Iterable[str]) -> str:
    """`name`, and the one of `candidates` that it may have been mistaken for."""
    # Comparing takes the product of the lengths; a name so much longer is not the same one misspelt.
    likely = [c for c in candidates if abs(len(c) - len(name)) <= 8][:_MAX_CANDIDATES]
    near = difflib.get_close_matches(name, likely, 1, 0.8) if len(name) < 200 else []
    return f"{printable(name)} (nearest: {printable(near[0])})" if near else printable(name)


def _infer_se(keys: KeyMap, parts: Parts) -> SqueezeExcite | None:
    for position in ("before", "after"):
        hidden = next((parts[part] for part in parts if part.startswith(f"se_{position}.down.")), None)
        hidden = parts.get(f"se_{position}.down.weight", hidden)
        if hidden is None:
            continue
        if "bn.weight" in parts:
            raise CheckpointError(
                "the blocks have a squeeze-excite between the branches and the BN after their sum",
                f"such a {keys.layout.name} net has no equivalent convolution; train it without the squeeze-excite",
            )
        return SqueezeExcite(hidden.shape[0], "before" if position == "before" else "after")
    return None
