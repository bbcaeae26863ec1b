"""timm, byobnet.py (https://github.com/huggingface/pytorch-image-models)."""

from repvgg_deploy.checkpoints.layout import Layout, Segment, numbered_stages

LAYOUT = Layout(
    "timm",
    (Segment("stem", 0), *numbered_stages("stages.{s}.{b}", first=0)),
    {
        "conv_kxk.conv": "branch_3x3.conv",
        "conv_kxk.bn": "branch_3x3.bn",
        "conv_1x1.conv": "branch_1x1.conv",
        "conv_1x1.bn": "branch_1x1.bn",
        "identity": "branch_identity.bn",
        "reparam_conv": "conv",
        "attn.fc1": "se_before.down",
        "attn.fc2": "se_before.up",
    },
    head="head.fc",
)
