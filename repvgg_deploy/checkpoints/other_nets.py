"""Networks that are not RepVGGs, told by their tensors' names: what a user is likely to have mixed up."""

from __future__ import annotations

import re
from collections.abc import Collection

# A key that tells another network: what a user is likely to have mixed up.
_OTHERS = (
    (r"^stages\.\d+\.\d+\.conv_kxk\.\d+\.", "a MobileOne (timm)"),
    (r"^stage\d+\.\d+\.rbr_conv\.\d+\.", "a MobileOne"),
    (r"^layer1\.0\.conv\d\.weight", "a ResNet"),
    (r"^conv_stem\.weight|^blocks\.\d+\.\d+\.(conv_pw|conv_dw)", "an EfficientNet or MobileNet (timm)"),
    (r"^patch_embed\.|^conv_proj\.|\.attn\.qkv\.", "a vision transformer"),
    (r"^downsample_layers\.|\.conv_dw\.weight.*|\.dwconv\.weight", "a ConvNeXt"),
    (
        r"^features\.\d+\.conv\.|^features\.\d+\.0\.weight|^features\.\d+\.block",
        "a torchvision MobileNet or EfficientNet",
    ),
    (r"^features\.\d+\.weight", "a VGG"),
    (r"ERBlock_|^detect\.|^neck\.", "a YOLOv6 detector"),
)


def recognize_net(keys: Collection[str]) -> str | None:
    """The network that has a tensor of such a name, if it is one of the well-known."""
    return next((name for pattern, name in _OTHERS if any(re.search(pattern, key) for key in keys)), None)
