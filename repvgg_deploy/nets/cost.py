"""What an architecture costs: parameters and multiply-adds, computed from its spec."""

from __future__ import annotations

from itertools import pairwise

from repvgg_deploy.nets.spec import IDENTITY, ArchSpec, BlockSpec


def count_parameters(spec: ArchSpec) -> int:
    """Trainable values of the net in the form that `spec` has: kernels, biases, BN weights, the classifier."""
    return sum(_block_parameters(block) for block in spec.blocks) + _head_parameters(spec)


def count_flops(spec: ArchSpec, height: int, width: int) -> int:
    """Operations for one image of height x width pixels, as the field counts FLOPs of classifiers.

    A multiply-add of a convolution or of the classifier is 1, a bias 1 per value, a BN 2 per value. ReLU, additions of
    branches and pooling are not counted. Within 0.3 % of what OpenMMLab reports for its RepVGGs.
    """
    total = sum(inputs * outputs for inputs, outputs in pairwise(_head_widths(spec)))
    for block in spec.blocks:
        height, width = (-(-size // block.stride) for size in (height, width))
        total += height * width * _flops_per_pixel(block)
        if block.squeeze_excite is not None:
            total += 2 * block.out_channels * block.squeeze_excite.channels
    return total


def count_layer_macs(spec: ArchSpec, height: int, width: int) -> dict[str, int]:
    """Multiply-adds of each block's convolutions and of the classifier for one image, by `stages.S.B` and `classifier`.

    Squeeze-excites and hidden layers of the head are not counted.
    """
    macs: dict[str, int] = {}
    for s, stage in enumerate(spec.stages):
        for b, block in enumerate(stage):
            height, width = (-(-size // block.stride) for size in (height, width))
            macs[f"stages.{s}.{b}"] = height * width * _macs_per_pixel(block)
    if spec.classes:
        inputs, outputs = _head_widths(spec)[-2:]
        macs["classifier"] = inputs * outputs
    return macs


def _head_widths(spec: ArchSpec) -> tuple[int, ...]:
    return (spec.features, *spec.hidden, *((spec.classes,) if spec.classes else ()))


def _head_parameters(spec: ArchSpec) -> int:
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(_head_widths(spec)))


def _block_parameters(block: BlockSpec) -> int:
    width = block.out_channels
    per_tap = width * block.in_channels // block.groups
    total = 9 * per_tap + width if block.is_fused else 0
    total += sum(per_tap * branch.kernel**2 for branch in block.branches if branch.kernel != IDENTITY)
    total += 2 * width * (sum(branch.norm for branch in block.branches) + block.norm_after_sum)
    if block.squeeze_excite is not None:
        hidden = block.squeeze_excite.channels
        total += 2 * width * hidden + width + hidden
    return total


def _macs_per_pixel(block: BlockSpec) -> int:
    per_tap = block.out_channels * block.in_channels // block.groups
    return per_tap * (9 if block.is_fused else sum(branch.kernel**2 for branch in block.branches))


def _flops_per_pixel(block: BlockSpec) -> int:
    width = block.out_channels
    if block.is_fused:
        return _macs_per_pixel(block) + width
    norms = sum(branch.norm for branch in block.branches) + block.norm_after_sum
    return _macs_per_pixel(block) + 2 * width * norms
