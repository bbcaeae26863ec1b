"""The cards: what they describe is what the field published."""

from dataclasses import replace

import pytest
import torch
from helpers.small_nets import make_net

from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.cards import describe, find_card, load_cards, match_card
from repvgg_deploy.nets.cost import count_flops, count_layer_macs, count_parameters

PUBLISHED = [card for card in load_cards().values() if card.name != "RepVGG-demo"]
ALL = ["A0", "A1", "A2", "B0", "B1", "B1g2", "B1g4", "B2", "B2g2", "B2g4", "B3", "B3g2", "B3g4", "D2se", "L2pse"]


def test_all_fifteen_architectures_have_a_card() -> None:
    assert sorted(card.name.split("-")[1] for card in PUBLISHED) == sorted(ALL)


@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name)
def test_parameters_are_the_published_ones(card) -> None:
    assert count_parameters(card.spec()) / 1e6 == pytest.approx(card.published.train_params_m, abs=5.1e-4)
    assert count_parameters(card.spec().fused()) / 1e6 == pytest.approx(card.published.deploy_params_m, abs=5.1e-4)


@pytest.mark.parametrize("card", [c for c in PUBLISHED if c.published.train_gflops], ids=lambda card: card.name)
def test_flops_are_the_published_ones(card) -> None:
    assert count_flops(card.spec(), 224, 224) / 1e9 == pytest.approx(card.published.train_gflops, rel=3e-3)
    assert count_flops(card.spec().fused(), 224, 224) / 1e9 == pytest.approx(card.published.deploy_gflops, rel=3e-3)


@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name)
def test_counted_parameters_are_those_of_the_built_net(card) -> None:
    import torch

    from repvgg_deploy.nets.repvgg import RepVGG

    for spec in (card.spec(classes=7), card.spec(classes=7).fused()):
        with torch.device("meta"):
            net = RepVGG(spec)
        assert count_parameters(spec) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", ["A0", "a0", "RepVGG-A0", "repvgg_a0", "REPVGG-a0", "repvgga0"])
def test_a_card_is_found_by_any_spelling(name) -> None:
    assert find_card(name).name == "RepVGG-A0"


def test_the_plus_architecture_is_found_by_both_names() -> None:
    assert find_card("L2pse") is find_card("RepVGGplus-L2pse")


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(DeployError) as caught:
        find_card("A7")
    assert "'A7'" in caught.value.message
    assert all(name in caught.value.hint for name in ALL)


@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name)
def test_a_spec_is_named_by_its_card_whatever_its_form_classes_and_channels(card) -> None:
    for spec in (card.spec(), card.spec().fused(), card.spec(classes=3, in_channels=1)):
        assert match_card(spec) is card
        assert describe(spec) == card.name


def test_an_architecture_without_a_card_is_described() -> None:
    spec = find_card("A0").spec()
    longer = replace(spec, stages=(*spec.stages[:2], spec.stages[2] + spec.stages[2][-1:], *spec.stages[3:]))
    assert match_card(longer) is None
    assert describe(longer) == "custom RepVGG (blocks 2,5,14,1; widths 48,48,96,192,1280)"


def test_holocrons_extra_block_in_every_stage_keeps_the_name() -> None:
    spec = find_card("A0").spec(classes=10)
    stages = tuple((*stage, replace(stage[-1], in_channels=stage[-1].out_channels, stride=1)) for stage in spec.stages)
    from repvgg_deploy.nets.spec import training_branches

    stages = tuple(tuple(replace(b, branches=training_branches(b)) for b in stage) for stage in stages)
    holocron = replace(spec, stages=stages)
    assert count_parameters(holocron) == 24_741_642
    assert match_card(holocron) is find_card("A0")
    assert describe(holocron).startswith("RepVGG-A0 ")


def test_an_identity_branch_stands_only_where_shape_and_stride_allow() -> None:
    for card in PUBLISHED:
        for block in card.spec().blocks:
            has_identity = any(branch.kernel == 0 for branch in block.branches)
            assert has_identity == (block.in_channels == block.out_channels and block.stride == 1)


def test_groups_apply_to_every_second_layer_and_never_to_stage_four() -> None:
    blocks = find_card("B1g4").spec().blocks
    assert [i for i, block in enumerate(blocks) if block.groups == 4] == list(range(2, 27, 2))
    assert blocks[-1].groups == 1


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("repvgg_a0.rvgg_in1k", "RepVGG-A0"), ("timm/repvgg_b2g4.rvgg_in1k", "RepVGG-B2g4"),
        ("RepVGG-A0-train", "RepVGG-A0"), ("RepVGG-B1g4-200epochs-train.pth", "RepVGG-B1g4"),
        ("RepVGG-D2se-200epochs-train", "RepVGG-D2se"), ("RepVGGplus-L2pse-train256-acc84.06", "RepVGGplus-L2pse"),
        ("repvgg-a1_8xb32_in1k", "RepVGG-A1"), ("repvgg-B3g4_4xb64-autoaug-lbs-mixup-coslr-200e_in1k", "RepVGG-B3g4"),
        ("runs/A0/RepVGG-B0-deploy.pth", "RepVGG-B0"),
    ],
)  # fmt: skip
def test_full_names_of_libraries_and_files_are_taken(name: str, arch: str) -> None:
    assert find_card(name).name == arch


@pytest.mark.parametrize("name", ["repvgg", "repvgg_a0_b1", "A01", "in1k", "resnet50", ""])
def test_names_of_no_card_or_of_several_are_refused(name: str) -> None:
    with pytest.raises(DeployError, match="no architecture"):
        find_card(name)


@pytest.mark.parametrize("shape", [{}, {"groups": 2}])
def test_multiply_adds_of_layers_are_those_of_the_tensors(shape: dict[str, int]) -> None:
    net = fuse(make_net(**shape))
    seen: dict[str, int] = {}
    for name, block in net.named_blocks():
        block.conv.register_forward_hook(
            lambda conv, _, output, name=name: seen.update({name: conv.weight[0].numel() * output.numel()})
        )
    net(torch.zeros(1, 3, 45, 64))
    macs = count_layer_macs(net.spec, 45, 64)
    assert macs.pop("classifier") == net.classifier.weight.numel()
    assert macs == seen
