"""Small RepVGGs with realistic BN statistics, and the names that each library gives their tensors.

The names are written down here by hand, from the libraries' own code: the tests hold the package's tables against them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.spec import IDENTITY, ArchSpec, BlockSpec, Branch, SqueezeExcite

PLAIN = (Branch(3), Branch(1), Branch(IDENTITY))
BARE = (Branch(3), Branch(1, norm=False), Branch(IDENTITY, norm=False))
ONLY_3X3 = (Branch(3),)


def make_spec(
    blocks: tuple[int, ...] = (2, 2, 4, 1),
    widths: tuple[int, ...] = (8, 8, 12, 16, 24),
    classes: int = 5,
    in_channels: int = 3,
    groups: int = 1,
    branches: tuple[Branch, ...] = PLAIN,
    norm_after_sum: bool = False,
    squeeze_excite: SqueezeExcite | None = None,
) -> ArchSpec:
    """Stages of `blocks` after a stem of one; `groups` at every second block that is no first of its stage."""
    channels = in_channels
    stages = []
    for count, width in zip((1, *blocks), widths, strict=True):
        stage = []
        for index in range(count):
            block = BlockSpec(channels, width, 1 if index else 2, 1, (), norm_after_sum, squeeze_excite)
            block = replace(block, groups=groups if index % 2 else 1)
            can = tuple(b for b in branches if b.kernel != IDENTITY or block.can_skip)
            stage.append(replace(block, branches=can))
            channels = width
        stages.append(tuple(stage))
    return ArchSpec(tuple(stages), classes)


@torch.no_grad()
def randomize(net: nn.Module, seed: int = 0) -> None:
    """Weights of the usual size and BN statistics as after training: σ² over a decade, γ of either size, μ ≠ 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.4, 1.2, generator=generator)
            module.bias.normal_(0, 0.2, generator=generator)
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 3.0, generator=generator)
            module.num_batches_tracked.fill_(1000)


def make_net(seed: int = 0, **spec: Any) -> RepVGG:
    """A random net in training form, in evaluation mode."""
    net = RepVGG(make_spec(**spec)).requires_grad_(False).eval()
    randomize(net, seed)
    return net


def logits_of(net: nn.Module, images: Tensor) -> Tensor:
    """The logits in float64; the net stays as it is."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in net.state_dict().items()}
    return torch.func.functional_call(net, wide, (images.double(),)).detach()


def relative(candidate: Tensor, reference: Tensor) -> float:
    """‖candidate − reference‖ / ‖reference‖."""
    return float((candidate.double() - reference.double()).norm() / reference.double().norm())


_OFFICIAL = {
    "branch_3x3.conv": "rbr_dense.conv",
    "branch_3x3.bn": "rbr_dense.bn",
    "branch_1x1.conv": "rbr_1x1.conv",
    "branch_1x1.bn": "rbr_1x1.bn",
    "branch_identity.bn": "rbr_identity",
    "conv": "rbr_reparam",
    "se_before.down": "se.down",
    "se_before.up": "se.up",
    "bn": "bn",
}
_PARTS = {
    "official": _OFFICIAL,
    "official-plus": {**_OFFICIAL, "se_after.down": "post_se.down", "se_after.up": "post_se.up"},
    "qarepvgg-v1": _OFFICIAL,
    "qarepvgg-v2": {**_OFFICIAL, "branch_1x1.conv": "rbr_1x1"},
    "repoptimizers": {
        "branch_3x3.conv": "conv",
        "branch_3x3.bn": "bn",
        "conv": "conv",
        "se_after.down": "post_se.down",
        "se_after.up": "post_se.up",
    },
    "timm": {
        "branch_3x3.conv": "conv_kxk.conv",
        "branch_3x3.bn": "conv_kxk.bn",
        "branch_1x1.conv": "conv_1x1.conv",
        "branch_1x1.bn": "conv_1x1.bn",
        "branch_identity.bn": "identity",
        "conv": "reparam_conv",
        "se_before.down": "attn.fc1",
        "se_before.up": "attn.fc2",
    },
    "openmmlab": {
        "branch_3x3.conv": "branch_3x3.conv",
        "branch_3x3.bn": "branch_3x3.norm",
        "branch_1x1.conv": "branch_1x1.conv",
        "branch_1x1.bn": "branch_1x1.norm",
        "branch_identity.bn": "branch_norm",
        "conv": "branch_reparam",
        "se_before.down": "se_layer.conv1.conv",
        "se_before.up": "se_layer.conv2.conv",
    },
    "holocron": {
        "branch_3x3.conv": "branches.0.0",
        "branch_3x3.bn": "branches.0.1",
        "branch_1x1.conv": "branches.1.0",
        "branch_1x1.bn": "branches.1.1",
        "branch_identity.bn": "branches.2",
        "conv": "branches",
    },
}
_HEADS = {"timm": "head.fc", "openmmlab": "head.fc", "holocron": "head"}

NETS: dict[str, dict[str, Any]] = {
    "official": {},
    "official-plus": {"squeeze_excite": SqueezeExcite(4, "after")},
    "timm": {"squeeze_excite": SqueezeExcite(4)},
    "openmmlab": {"squeeze_excite": SqueezeExcite(4)},
    "holocron": {},
    "qarepvgg-v1": {"norm_after_sum": True},
    "qarepvgg-v2": {"norm_after_sum": True, "branches": BARE},
    "repoptimizers": {"branches": ONLY_3X3, "squeeze_excite": SqueezeExcite(4, "after")},
}
"""What each layout's nets have, beyond three branches."""


def _block_prefix(layout: str, stage: int, block: int, depth: int) -> str:
    if layout == "timm":
        return f"stages.{stage - 1}.{block}" if stage else "stem"
    if layout == "openmmlab":
        return f"backbone.stage_{stage}.{block}" if stage else "backbone.stem"
    if layout == "holocron":
        return f"features.{stage}.{block}"
    if stage == 0:
        return "stage0"
    if layout != "official-plus":
        return f"stage{stage}.{block}"
    if stage != 3:
        return f"stage{stage}.blocks.{block}"
    half = depth // 2
    return f"stage3_first.blocks.{block}" if block < half else f"stage3_second.blocks.{block - half}"


def name_in_layout(net: RepVGG, layout: str) -> dict[str, Tensor]:
    """The tensors of `net`, of either form, as the library of `layout` names them."""
    named = {}
    for key, tensor in net.state_dict().items():
        if key.startswith("classifier."):
            named[key.replace("classifier", _HEADS.get(layout, "linear"))] = tensor.clone()
            continue
        _, stage, block, rest = key.split(".", 3)
        part, leaf = rest.rsplit(".", 1)
        prefix = _block_prefix(layout, int(stage), int(block), len(net.spec.stages[int(stage)]))
        named[f"{prefix}.{_PARTS[layout][part]}.{leaf}"] = tensor.clone()
    return named


class Segmenter(nn.Module):
    """Two RepVGG blocks and a head that is no classifier."""

    def __init__(self) -> None:
        super().__init__()
        blocks = list(make_net().blocks())
        self.encoder = nn.Sequential(*blocks[:2])
        self.head = nn.Conv2d(blocks[1].spec.out_channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))
