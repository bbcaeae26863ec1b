"""Which integers stand for activations, by who is to run them.

Behind a ReLU there is nothing negative, and a QuantizeLinear to uint8 with zero-point 0 saturates at zero as the ReLU
does: ONNX Runtime then lets the convolution's own saturation be the ReLU. TensorRT's parser reads such a zero-point as
int8 (it says so in a warning), which has the same codes up to 127; so a file whose scales are chosen for 0…127 means
the same to both, but for what lies beyond the clipping threshold: TensorRT saturates there, ONNX Runtime at 255.
"""

from __future__ import annotations

from enum import Enum

from torch import nn

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, SqueezeExciteBlock
from repvgg_deploy.quantize.edges import CLASSIFIER, POOL, fused_blocks

LOWEST = -128
SIGNED_HIGHEST = 127
UNSIGNED_HIGHEST = 255


class Target(str, Enum):
    """Who is to run the integers.

    `portable`: TensorRT and ONNX Runtime; activations have the codes 0…127. `onnxruntime`: that one alone, with twice
    as many; the file has zero-point −128, so that TensorRT refuses it and cannot run it wrongly.
    """

    PORTABLE = "portable"
    ONNXRUNTIME = "onnxruntime"

    @property
    def highest(self) -> int:
        """The code of the clipping threshold of an edge without negative values."""
        return SIGNED_HIGHEST if self is Target.PORTABLE else UNSIGNED_HIGHEST


def unsigned_edges(net: RepVGG) -> frozenset[str]:
    """The edges of a fused net that never hold a negative value: all behind a ReLU."""
    blocks = fused_blocks(net)
    readers = [[name] for name, _ in blocks[1:]] + [[POOL, CLASSIFIER]]
    found = zip(blocks, readers, strict=True)
    return frozenset(name for (_, block), names in found if _ends_in_relu(block) for name in names)


def highest_codes(net: RepVGG, highest: int) -> dict[str, int]:
    """The code at which each edge saturates: `highest` without negative values, and 127 with them."""
    unsigned = unsigned_edges(net)
    names = [*(name for name, _ in fused_blocks(net)), POOL, CLASSIFIER]
    return {name: highest if name in unsigned else SIGNED_HIGHEST for name in names}


def _ends_in_relu(block: FusedBlock) -> bool:
    # A squeeze-excite behind it multiplies by a sigmoid.
    return isinstance(block.act, nn.ReLU) and isinstance(block.se_after, nn.Identity | SqueezeExciteBlock)
