"""Holocron (https://github.com/frgfm/Holocron): every stage, the stem's too, has one block more than its card says."""

from repvgg_deploy.checkpoints.layout import Layout, Segment

LAYOUT = Layout(
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
