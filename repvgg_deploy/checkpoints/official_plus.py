"""RepVGGplus, repvggplus.py (https://github.com/DingXiaoH/RepVGG): stage 3 in two halves, auxiliary heads."""

from repvgg_deploy.checkpoints.layout import Layout, Segment
from repvgg_deploy.checkpoints.official import PARTS

LAYOUT = Layout(
    "official-plus",
    (
        Segment("stage0", 0),
        Segment("stage1.blocks.{b}", 1),
        Segment("stage2.blocks.{b}", 2),
        Segment("stage3_first.blocks.{b}", 3),
        Segment("stage3_second.blocks.{b}", 3),
        Segment("stage4.blocks.{b}", 4),
    ),
    {**PARTS, "post_se.down": "se_after.down", "post_se.up": "se_after.up"},
    head="linear",
    ignored=r"^stage\w+_aux\.",
)
