"""Which integers stand for activations, by who is to run them.

Behind a ReLU there is nothing negative, and a QuantizeLinear to uint8 with zero-point 0 saturates at zero as the ReLU
does: ONNX Runtime then lets the convolution's own saturation be the ReLU. TensorRT's parser reads such a zero-point as
int8 (it says so in a warning), which has the same codes up to 127; so a file whose scales are chosen for 0…127 means
the same to both, but for what lies beyond the clipping threshold: TensorRT saturates there, ONNX Runtime at 255.

Half of int8's codes are never used that way. `full-range` uses them all where a convolution reads what another one
makes; `repvgg_deploy.quantize.constant_channels` says how, without a zero-point.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from itertools import pairwise

from torch import nn

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, SqueezeExciteBlock
from repvgg_deploy.quantize.edges import CLASSIFIER, POOL, fused_blocks

LOWEST = -128
SIGNED_HIGHEST = 127
UNSIGNED_HIGHEST = 255


class Target(str, Enum):
    """Who is to run the integers.

    `portable`: TensorRT and ONNX Runtime; activations have the codes 0…127. `full-range`: the same two, with twice as
    many codes on most edges, for a few constant channels more. `onnxruntime`: that one alone, with twice as many
    everywhere; the file has zero-point −128, so that TensorRT refuses it and cannot run it wrongly.
    """

    PORTABLE = "portable"
    FULL_RANGE = "full-range"
    ONNXRUNTIME = "onnxruntime"

    @property
    def highest(self) -> int:
        """The code of the clipping threshold of an edge without negative values, where it is not a wide one."""
        return UNSIGNED_HIGHEST if self is Target.ONNXRUNTIME else SIGNED_HIGHEST


def unsigned_edges(net: RepVGG) -> frozenset[str]:
    """The edges of a fused net that never hold a negative value: all behind a ReLU."""
    blocks = fused_blocks(net)
    readers = [[name] for name, _ in blocks[1:]] + [[POOL, CLASSIFIER]]
    found = zip(blocks, readers, strict=True)
    return frozenset(name for (_, block), names in found if _ends_in_relu(block) for name in names)


def wide_edges(net: RepVGG, target: Target, kept_float: Collection[str] = ()) -> frozenset[str]:
    """The edges with all 256 codes in a file for `full-range`; none for other targets.

    They lie between two quantized, ungrouped convolutions with nothing but a ReLU in between. `kept_float` are the
    names of layers that are not quantized.
    """
    if target is not Target.FULL_RANGE:
        return frozenset()
    return frozenset(
        reader
        for (name, block), (reader, following) in pairwise(fused_blocks(net))
        if is_plain(block) and block.conv.groups == following.conv.groups == 1 and not {name, reader} & {*kept_float}
    )


def highest_codes(net: RepVGG, highest: int, wide: Collection[str] = ()) -> dict[str, int]:
    """The code at which each edge saturates: `highest` without negative values, 255 where `wide`, 127 with them.

    The codes of a wide edge are counted from 0 here; in the file they are 128 lower.
    """
    unsigned = unsigned_edges(net)
    names = [*(name for name, _ in fused_blocks(net)), POOL, CLASSIFIER]
    codes = {name: highest if name in unsigned else SIGNED_HIGHEST for name in names}
    return codes | dict.fromkeys(wide, UNSIGNED_HIGHEST)


def clipping_codes(net: RepVGG, target: Target, kept_float: Collection[str] = ()) -> dict[str, int]:
    """The code of each edge's clipping threshold."""
    return highest_codes(net, target.highest, wide_edges(net, target, kept_float))


def is_plain(block: FusedBlock) -> bool:
    """Whether only a ReLU follows the block's convolution."""
    parts = (block.se_before, block.se_after)
    return isinstance(block.act, nn.ReLU) and all(isinstance(part, nn.Identity) for part in parts)


def _ends_in_relu(block: FusedBlock) -> bool:
    # A squeeze-excite behind it multiplies by a sigmoid.
    return isinstance(block.act, nn.ReLU) and isinstance(block.se_after, nn.Identity | SqueezeExciteBlock)
