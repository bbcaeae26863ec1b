"""The speeds that the RepVGG paper reports, to hold an order of models against.

Source: "RepVGG: Making VGG-style ConvNets Great Again", table 4 (https://arxiv.org/abs/2101.03697): images/s on a
GTX 1080 Ti, PyTorch, fp32, batch 128.
"""

from __future__ import annotations

from collections.abc import Mapping

IMAGES_PER_SEC_1080TI: Mapping[str, int] = {
    "RepVGG-A0": 3256,
    "RepVGG-A1": 2339,
    "RepVGG-B0": 1817,
    "RepVGG-A2": 1322,
    "RepVGG-B1g4": 868,
    "RepVGG-B1g2": 792,
    "ResNet-50": 719,
    "RepVGG-B1": 685,
    "RepVGG-B2g4": 581,
    "RepVGG-B2": 460,
    "ResNet-101": 430,
    "RepVGG-B3": 363,
}
