"""The cards: what they describe is what the field published."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import UNREADABLE, Place, find, places, replaced, to_toml, truncated, without, wrong_for
from helpers.small_nets import make_net

from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.cards import RepVGGCard, describe, find_card, load_baselines, load_cards, match_card, read_card
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


FILES = Path(__file__).parents[2] / "models"
TABLES: dict[str, dict[str, Any]] = {
    name: tomllib.loads((FILES / f"{name}.toml").read_text(encoding="utf-8"))
    for name in ("repvgg_d2se", "resnet50", "vgg16")
}
TABLES["repvgg_d2se"] |= {"classes": 2, "class_names": ["cat", "dog"]}
TABLES["repvgg_d2se"]["arch"] |= {"stem": 64, "groups": 1}
FIELDS = [(name, place) for name, table in TABLES.items() for place in places(table)]
OPTIONAL = {"classes", "class_names", "published", "stem", "groups", "se_ratio", "se_position"}


def test_every_file_is_a_card_of_one_kind() -> None:
    cards = [read_card(path) for path in FILES.glob("*.toml")]
    assert {card.name for card in cards} == {*load_cards(), *load_baselines()}
    assert all(isinstance(card, RepVGGCard) == (card.name in load_cards()) for card in cards)


def refused(path: Path) -> str:
    with pytest.raises(DeployError) as raised:
        read_card(path)
    assert str(path) in raised.value.message
    assert raised.value.message.isprintable()
    assert raised.value.hint
    return raised.value.message


@pytest.mark.parametrize(
    ("name", "place"), FIELDS, ids=lambda value: value if isinstance(value, str) else str(value[-1])
)
def test_a_field_that_is_needed_cannot_be_missing_and_none_may_be_wrong(
    name: str, place: Place, tmp_path: Path
) -> None:
    path = tmp_path / "card.toml"
    path.write_text(to_toml(without(TABLES[name], place)))
    if place == ("classes",):
        assert "class_names: 2 for 1000 classes" in refused(path)
    elif OPTIONAL & set(place) and isinstance(place[-1], str):
        assert isinstance(read_card(path).blocks, tuple)
    elif place[0] != "class_names":
        assert str(place[-1]) in refused(path) or isinstance(place[-1], int)
    for wrong in wrong_for(find(TABLES[name], place)):
        if (place, wrong) == (("published",), {}):
            continue
        path.write_text(to_toml(replaced(TABLES[name], place, wrong)))
        message = refused(path)
        assert str(place[0]) in message, (wrong, message)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("arch", "speed"), 1, "arch: unknown field `speed`"),
        (("family",), "vit", "family"),
        (("family",), "vgg", "arch"),
        (("arch", "groups"), 48, "arch.groups: 48 does not divide the widths"),
        (("arch", "width_multipliers"), [0.01, 1.0, 1.0, 1.0], "are too small"),
        (("preprocessing", "std"), [0.2, 0.2], "preprocessing.std: Expected `array` of length 3"),
        (("preprocessing", "size"), 1 << 40, "preprocessing.size: Expected `int` <= 8192"),
    ],
)
def test_a_wrong_value_is_named(place: Place, value: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_text(to_toml(replaced(TABLES["repvgg_d2se"], place, value)))
    assert said in refused(path)


def test_a_card_that_is_no_toml_or_is_truncated_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    for content in [*UNREADABLE, *truncated((FILES / "repvgg_a0.toml").read_bytes())[:6]]:
        path.write_bytes(content)
        refused(path)
