"""RepOptimizers' target net (https://github.com/DingXiaoH/RepOptimizers): one 3×3 convolution and one BN a block.

Its deploy form is the same net with the BNs folded into the convolutions, which get a bias.
"""

from repvgg_deploy.checkpoints.layout import Layout
from repvgg_deploy.checkpoints.official import LAYOUT as OFFICIAL
from repvgg_deploy.nets.cards import Branch

_SE = {"post_se.down": "se_after.down", "post_se.up": "se_after.up"}

LAYOUT = Layout(
    "repoptimizers",
    OFFICIAL.segments,
    {"conv": "branch_3x3.conv", "bn": "branch_3x3.bn", **_SE},
    head="linear",
    branches=(Branch(3),),
)
DEPLOY = Layout("repoptimizers", OFFICIAL.segments, {"conv": "conv", **_SE}, head="linear")
