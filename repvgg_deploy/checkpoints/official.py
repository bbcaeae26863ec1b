"""The official code, repvgg.py (https://github.com/DingXiaoH/RepVGG)."""

from repvgg_deploy.checkpoints.layout import Layout, Segment, numbered_stages

PARTS = {
    "rbr_dense.conv": "branch_3x3.conv",
    "rbr_dense.bn": "branch_3x3.bn",
    "rbr_1x1.conv": "branch_1x1.conv",
    "rbr_1x1.bn": "branch_1x1.bn",
    "rbr_identity": "branch_identity.bn",
    "rbr_reparam": "conv",
    "se.down": "se_before.down",
    "se.up": "se_before.up",
}

LAYOUT = Layout("official", (Segment("stage0", 0), *numbered_stages("stage{s}.{b}")), PARTS, head="linear")
