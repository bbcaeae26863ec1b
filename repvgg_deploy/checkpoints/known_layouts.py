"""The layouts of the libraries whose checkpoints are read, one `Layout` each."""

from repvgg_deploy.checkpoints.layout import Layout, Segment, numbered_stages
from repvgg_deploy.nets.spec import IDENTITY, Branch

_BLOCK_OF_OFFICIAL = {
    "rbr_dense.conv": "branch_3x3.conv",
    "rbr_dense.bn": "branch_3x3.bn",
    "rbr_1x1.conv": "branch_1x1.conv",
    "rbr_1x1.bn": "branch_1x1.bn",
    "rbr_identity": "branch_identity.bn",
    "rbr_reparam": "conv",
    "se.down": "se_before.down",
    "se.up": "se_before.up",
}
_POST_SE = {"post_se.down": "se_after.down", "post_se.up": "se_after.up"}

# repvgg.py of the official code (https://github.com/DingXiaoH/RepVGG).
OFFICIAL = Layout(
    "official", (Segment("stage0", 0), *numbered_stages("stage{s}.{b}")), _BLOCK_OF_OFFICIAL, head="linear"
)

# repvggplus.py of the same code: stage 3 is in two halves, and training has auxiliary heads.
OFFICIAL_PLUS = Layout(
    "official-plus",
    (
        Segment("stage0", 0),
        Segment("stage1.blocks.{b}", 1),
        Segment("stage2.blocks.{b}", 2),
        Segment("stage3_first.blocks.{b}", 3),
        Segment("stage3_second.blocks.{b}", 3),
        Segment("stage4.blocks.{b}", 4),
    ),
    {**_BLOCK_OF_OFFICIAL, **_POST_SE},
    head="linear",
    ignored=r"^stage\w+_aux\.",
)

# byobnet.py of timm (https://github.com/huggingface/pytorch-image-models).
TIMM = Layout(
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

# What timm's features_only=True makes of it: the stages in one list.
TIMM_FEATURES = Layout(
    "timm", (Segment("stem", 0), *numbered_stages("stages_{s}.{b}", first=0)), TIMM.parts, head=TIMM.head
)

# mmcls 0.x and mmpretrain 1.x (https://github.com/open-mmlab/mmpretrain); the prefix `backbone.` is stripped before.
OPENMMLAB = Layout(
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

# Holocron (https://github.com/frgfm/Holocron): every stage, the stem too, has one block more than its card says.
HOLOCRON = Layout(
    "holocron",
    tuple(Segment(f"features.{s}.{{b}}", s) for s in range(10)),
    {
        "branches.0.0": "branch_3x3.conv",
        "branches.0.1": "branch_3x3.bn",
        "branches.1.0": "branch_1x1.conv",
        "branches.1.1": "branch_1x1.bn",
        "branches.2": "branch_identity.bn",
        "branches": "conv",
    },
    head="head",
)

# QARepVGG (https://arxiv.org/abs/2212.01593): the official names, and a BN after the sum. V1 keeps a BN in the 1×1 and
# the identity branch; V2 has both without one, so its identity leaves no tensor in the file.
QAREPVGG_V1 = Layout(
    "qarepvgg-v1", OFFICIAL.segments, {**_BLOCK_OF_OFFICIAL, "bn": "bn"}, head="linear", norm_after_sum=True
)
QAREPVGG_V2 = Layout(
    "qarepvgg-v2",
    OFFICIAL.segments,
    {
        **{name: part for name, part in _BLOCK_OF_OFFICIAL.items() if not name.startswith("rbr_1x1")},
        "rbr_1x1": "branch_1x1.conv",
        "bn": "bn",
    },
    head="linear",
    branches=(Branch(3), Branch(1, norm=False), Branch(IDENTITY, norm=False)),
    norm_after_sum=True,
)

# The target net of RepOptimizers (https://github.com/DingXiaoH/RepOptimizers): one 3×3 convolution and one BN per
# block. Its deploy form has the BNs folded into the convolutions, which get a bias.
REPOPTIMIZERS = Layout(
    "repoptimizers",
    OFFICIAL.segments,
    {"conv": "branch_3x3.conv", "bn": "branch_3x3.bn", **_POST_SE},
    head="linear",
    branches=(Branch(3),),
)
REPOPTIMIZERS_DEPLOY = Layout("repoptimizers", OFFICIAL.segments, {"conv": "conv", **_POST_SE}, head="linear")

LAYOUTS = (
    OFFICIAL,
    OFFICIAL_PLUS,
    TIMM,
    TIMM_FEATURES,
    OPENMMLAB,
    HOLOCRON,
    QAREPVGG_V1,
    QAREPVGG_V2,
    # Before the training form: of two layouts that know the same keys the first is taken.
    REPOPTIMIZERS_DEPLOY,
    REPOPTIMIZERS,
)
