"""Which integers stand for activations.

Behind a ReLU there is nothing negative, and a QuantizeLinear to uint8 with zero-point 0 saturates at zero as the ReLU
does: ONNX Runtime then lets the convolution's own saturation be the ReLU. TensorRT's parser reads such a zero-point as
int8 (it says so in a warning), which has the same integers up to 127. So scales are chosen for the integers 0…127, and
one file means the same to both, but for what lies beyond the clipping threshold: TensorRT saturates there, ONNX Runtime
at 255.
"""

from __future__ import annotations

from torch import nn

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, SqueezeExciteBlock
from repvgg_deploy.quantization.points import CLASSIFIER, POOL, fused_blocks, point_names

# Where an int8 QuantizeLinear saturates, one step below the clipping threshold −127.
LOWEST = -128
CLIPPING = 127
"""The integer of the clipping threshold, at every point."""
# Where a uint8 QuantizeLinear saturates: ONNX Runtime keeps the integers above the clipping threshold.
UNSIGNED_HIGHEST = 255

FULL_CLIPPING = 204
"""The integer of the clipping threshold where all integers to 255 are used.

At 255 itself there would be no room for images that reach further than those of the calibration.
"""


def unsigned_points(net: RepVGG) -> frozenset[str]:
    """The points of a fused net that never hold a negative value: all after a ReLU."""
    blocks = fused_blocks(net)
    readers = [[name] for name, _ in blocks[1:]] + [[POOL, CLASSIFIER] if net.has_classifier else [POOL]]
    found = zip(blocks, readers, strict=True)
    return frozenset(name for (_, block), names in found if _ends_in_relu(block) for name in names)


def highest_integers(net: RepVGG, unsigned_highest: int) -> dict[str, int]:
    """The integer at which each point saturates: `unsigned_highest` where nothing is negative, 127 elsewhere."""
    unsigned = unsigned_points(net)
    return {name: unsigned_highest if name in unsigned else CLIPPING for name in point_names(net)}


def is_plain(block: FusedBlock) -> bool:
    """Whether only a ReLU follows the block's convolution."""
    parts = (block.se_before, block.se_after)
    return isinstance(block.act, nn.ReLU) and all(isinstance(part, nn.Identity) for part in parts)


def _ends_in_relu(block: FusedBlock) -> bool:
    # A squeeze-excite after it multiplies by a sigmoid.
    return isinstance(block.act, nn.ReLU) and isinstance(block.se_after, nn.Identity | SqueezeExciteBlock)
