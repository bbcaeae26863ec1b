"""What a specification says of a net's tensors is what the net has."""

from __future__ import annotations

import pytest
import torch
from helpers.small_nets import BARE, ONLY_3X3, make_spec

from repvgg_deploy.nets.cards import load_cards
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.spec import ArchSpec, SqueezeExcite, tensor_shapes

SPECS = {name: card.spec() for name, card in load_cards().items()} | {
    "squeeze-excite before": make_spec(squeeze_excite=SqueezeExcite(3)),
    "squeeze-excite after": make_spec(squeeze_excite=SqueezeExcite(3, "after")),
    "bare branches, BN after the sum": make_spec(branches=BARE, norm_after_sum=True),
    "one branch, groups": make_spec(branches=ONLY_3X3, groups=4),
}


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("name", SPECS)
def test_the_shapes_of_a_specification_are_those_of_the_net_in_its_order(name: str, form: str) -> None:
    spec: ArchSpec = SPECS[name] if form == "train" else SPECS[name].fused()
    with torch.device("meta"):
        state = RepVGG(spec).state_dict()
    expected = {
        key: tuple(tensor.shape)
        for key, tensor in state.items()
        if key.startswith("stages.") and not key.endswith("num_batches_tracked")
    }
    assert list(tensor_shapes(spec).items()) == list(expected.items())
