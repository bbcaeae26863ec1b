"""RepOptimizers' target net (https://github.com/DingXiaoH/RepOptimizers): one 3×3 convolution and one BN a block."""

from repvgg_deploy.checkpoints.layouts import Layout
from repvgg_deploy.checkpoints.official import LAYOUT as OFFICIAL

LAYOUT = Layout(
    "repoptimizers",
    OFFICIAL.segments,
    {
        "conv": "branch_3x3.conv",
        "bn": "branch_3x3.bn",
        "post_se.down": "se_after.down",
        "post_se.up": "se_after.up",
    },
    head="linear",
)
