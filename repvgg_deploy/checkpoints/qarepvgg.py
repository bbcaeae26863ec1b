"""QARepVGG (https://arxiv.org/abs/2212.01593): official names and a BN after the sum.

V1 keeps a BN in the 1×1 and the identity branch; V2 has both bare, so its identity leaves no tensor in the file.
"""

from repvgg_deploy.checkpoints.layout import Layout
from repvgg_deploy.checkpoints.official import LAYOUT as OFFICIAL
from repvgg_deploy.checkpoints.official import PARTS
from repvgg_deploy.nets.cards import IDENTITY, Branch

V1 = Layout("qarepvgg-v1", OFFICIAL.segments, {**PARTS, "bn": "bn"}, head="linear", norm_after_sum=True)

V2 = Layout(
    "qarepvgg-v2",
    OFFICIAL.segments,
    {**{k: v for k, v in PARTS.items() if not k.startswith("rbr_1x1")}, "rbr_1x1": "branch_1x1.conv", "bn": "bn"},
    head="linear",
    branches=(Branch(3), Branch(1, norm=False), Branch(IDENTITY, norm=False)),
    norm_after_sum=True,
)
