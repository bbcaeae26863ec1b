"""OpenMMLab, mmcls 0.x and mmpretrain 1.x (https://github.com/open-mmlab/mmpretrain); `backbone.` is stripped."""

from repvgg_deploy.checkpoints.layout import Layout, Segment, numbered_stages

LAYOUT = Layout(
    "openmmlab",
    (Segment("stem", 0), *numbered_stages("stage_{s}.{b}")),
    {
        "branch_3x3.conv": "branch_3x3.conv",
        "branch_3x3.norm": "branch_3x3.bn",
        "branch_1x1.conv": "branch_1x1.conv",
        "branch_1x1.norm": "branch_1x1.bn",
        "branch_norm": "branch_identity.bn",
        "branch_reparam": "conv",
        "se_layer.conv1.conv": "se_before.down",
        "se_layer.conv2.conv": "se_before.up",
    },
    head="head.fc",
    ignored=r"^data_preprocessor\.",
)
