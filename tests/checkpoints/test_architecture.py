"""Checkpoints whose tensors are not those of one RepVGG: what is wrong is named, and what to do."""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.small_nets import NETS, make_net, name_in_layout
from torch import Tensor

from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.errors import CheckpointError, DeployError
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.spec import SqueezeExcite

Save = Callable[..., Path]
State = dict[str, Tensor]


def refused(path: Path, match: str, arch: str | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(path, arch)
    assert caught.value.hint
    return caught.value


def card_state(name: str) -> State:
    """All tensors of a card's net under official names, one stored number each: a file of a few kilobytes."""
    with torch.device("meta"):
        net = RepVGG(find_card(name).spec())
    return {key: torch.ones(()).expand(shape) for key, shape in _names_only(net).items()}


def _names_only(net: RepVGG) -> dict[str, torch.Size]:
    shapes = {}
    for key, tensor in net.state_dict().items():
        if key.startswith("classifier."):
            shapes[key.replace("classifier", "linear")] = tensor.shape
        elif not key.endswith("num_batches_tracked"):
            _, stage, block, rest = key.split(".", 3)
            prefix = "stage0" if stage == "0" else f"stage{stage}.{block}"
            rest = (
                rest.replace("se_before", "se")
                .replace("branch_identity.bn", "rbr_identity")
                .replace("branch_1x1", "rbr_1x1")
            )
            shapes[f"{prefix}.{rest.replace('branch_3x3', 'rbr_dense')}"] = tensor.shape
    return shapes


OTHER_NETWORKS = {
    "a ResNet": {"conv1.weight": (8, 3, 7, 7), "layer1.0.conv1.weight": (8, 8, 3, 3), "fc.weight": (5, 8)},
    "a VGG": {"features.0.weight": (8, 3, 3, 3), "features.0.bias": (8,), "classifier.0.weight": (5, 8)},
    "a MobileOne": {
        "stage0.rbr_conv.0.conv.weight": (8, 3, 3, 3),
        "stage1.0.rbr_conv.0.conv.weight": (8, 1, 3, 3),
        "stage1.0.rbr_skip.weight": (8,),
        "linear.weight": (5, 8),
    },
    "a MobileOne (timm)": {
        "stem.conv_kxk.0.conv.weight": (8, 3, 3, 3),
        "stages.0.0.identity.weight": (8,),
        "stages.0.0.conv_kxk.0.conv.weight": (8, 1, 3, 3),
        "stages.0.0.conv_kxk.0.bn.weight": (8,),
        "head.fc.weight": (5, 8),
    },
    "a vision transformer": {"patch_embed.proj.weight": (8, 3, 16, 16), "blocks.0.attn.qkv.weight": (24, 8)},
    "a ConvNeXt": {"stem.0.weight": (8, 3, 4, 4), "stages.0.blocks.0.conv_dw.weight": (8, 1, 7, 7)},
    "an EfficientNet or MobileNet": {"conv_stem.weight": (8, 3, 3, 3), "blocks.0.0.conv_dw.weight": (8, 1, 3, 3)},
    "a YOLOv6 detector": {
        "backbone.stem.rbr_dense.conv.weight": (8, 3, 3, 3),
        "backbone.ERBlock_2.0.rbr_dense.conv.weight": (8, 8, 3, 3),
        "detect.stems.0.conv.weight": (8, 8, 1, 1),
    },
}


@pytest.mark.parametrize("network", OTHER_NETWORKS)
def test_another_network_is_called_by_its_name(network: str, save: Save) -> None:
    state = {key: torch.zeros(shape) for key, shape in OTHER_NETWORKS[network].items()}
    message = refused(save({"state_dict": state}), "is not a RepVGG checkpoint").message
    assert f"it looks like {network}" in message


def test_unknown_network_is_described_by_its_first_tensors(save: Save) -> None:
    refused(save({"a.weight": torch.ones(2), "b.c": torch.ones(2)}), r"first tensors are a\.weight, b\.c")


def test_missing_tensor_is_named(state: State, save: Save) -> None:
    del state["stage2.1.rbr_1x1.bn.running_var"]
    error = refused(save(state), r"1 tensor is missing: stage2\.1\.rbr_1x1\.bn\.running_var")
    assert "5 classes" in error.hint


@pytest.mark.parametrize(
    "part", ["rbr_dense.conv.weight", "rbr_1x1.conv.weight", "rbr_1x1.", "rbr_identity.", "rbr_dense.bn."]
)
def test_missing_part_of_one_block_is_named_in_full(part: str, state: State, save: Save) -> None:
    left = {key: tensor for key, tensor in state.items() if not key.startswith(f"stage3.2.{part}")}
    assert left.keys() != state.keys()
    refused(save(left), rf"missing: stage3\.2\.{part}")


def test_missing_block_is_named(state: State, save: Save) -> None:
    refused(save({k: t for k, t in state.items() if not k.startswith("stage3.1.")}), r"missing: stage3\.1\.rbr_dense")


def test_missing_stage_is_named(state: State, save: Save) -> None:
    refused(save({k: t for k, t in state.items() if not k.startswith("stage2.")}), r"missing: stage2\.0\.rbr_dense")


def test_missing_stem_is_named(state: State, save: Save) -> None:
    left = {k: t for k, t in state.items() if not k.startswith("stage0.")}
    refused(save(left), r"missing: stage0\.rbr_dense\.conv\.weight")


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_missing_classifier_is_named(leaf: str, state: State, save: Save) -> None:
    del state[f"linear.{leaf}"]
    refused(save(state), rf"missing: linear\.{leaf}")


def test_missing_squeeze_excite_of_one_block_is_named(save: Save) -> None:
    state = name_in_layout(make_net(squeeze_excite=SqueezeExcite(4)), "official")
    refused(save({k: t for k, t in state.items() if not k.startswith("stage3.2.se.")}), r"missing: stage3\.2\.se\.")


@pytest.mark.parametrize("layout", ["timm", "openmmlab", "holocron", "official-plus"])
def test_missing_tensor_has_the_name_of_its_own_layout(layout: str, save: Save) -> None:
    state = name_in_layout(make_net(**NETS[layout]), layout)
    lost = [key for key in state if key.endswith("running_mean")][7]
    del state[lost]
    assert lost.removeprefix("backbone.") in refused(save(state), "missing").message


def test_misspelt_tensor_is_shown_with_the_nearest_name(state: State, save: Save) -> None:
    state["stage2.1.rbr_dense.bn.wieght"] = state.pop("stage2.1.rbr_dense.bn.weight")
    refused(save(state), r"stage2\.1\.rbr_dense\.bn\.weight \(nearest: stage2\.1\.rbr_dense\.bn\.wieght\)")


def test_surplus_tensor_is_named(state: State, save: Save) -> None:
    state["stage2.1.rbr_extra.conv.weight"] = torch.ones(3)
    refused(save(state), r"1 tensor does not belong to the net: stage2\.1\.rbr_extra\.conv\.weight")


def test_only_the_first_few_of_many_names_are_shown(state: State, save: Save) -> None:
    state |= {f"extra.{i}.weight": torch.ones(1, 2) for i in range(20)}
    message = refused(save(state), "20 tensors do not belong").message
    assert message.count("extra.") == 3
    assert message.endswith("…")


def test_convolution_bias_that_the_net_does_not_have_is_not_dropped(state: State, save: Save) -> None:
    state["stage1.1.rbr_dense.conv.bias"] = torch.ones(8)
    refused(save(state), r"not belong to the net: stage1\.1\.rbr_dense\.conv\.bias")


def test_deploy_and_training_tensors_in_one_block_contradict(state: State, save: Save) -> None:
    state |= {"stage1.1.rbr_reparam.weight": torch.ones(8, 8, 3, 3), "stage1.1.rbr_reparam.bias": torch.ones(8)}
    refused(save(state), r"not belong to the net: stage1\.1\.")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("stage1.1.rbr_dense.bn.running_mean", (9,)),
        ("stage1.1.rbr_1x1.conv.weight", (8, 8, 3, 3)),
        ("stage1.1.rbr_dense.conv.weight", (8, 8, 5, 5)),
        ("stage1.1.rbr_dense.conv.weight", (8, 8, 3)),
        ("stage1.1.rbr_dense.conv.weight", (8, 5, 3, 3)),
        ("stage1.1.rbr_dense.conv.weight", (7, 4, 3, 3)),
        ("stage1.1.rbr_identity.weight", (8, 1)),
        ("linear.weight", (5, 25)),
        ("linear.weight", (24,)),
        ("linear.bias", (6,)),
    ],
)
def test_shape_that_does_not_fit_is_named(key: str, shape: tuple[int, ...], state: State, save: Save) -> None:
    state[key] = torch.ones(shape)
    assert key in refused(save(state), str(shape).replace("(", r"\(").replace(")", r"\)")).message


@pytest.mark.parametrize("key", ["stage0.rbr_dense.conv.weight", "stage1.0.rbr_1x1.bn.weight", "linear.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (8, 0, 3, 3)])
def test_empty_tensor_is_named(key: str, shape: tuple[int, ...], state: State, save: Save) -> None:
    state[key] = torch.zeros(shape)
    assert key in refused(save(state), "is empty").message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["stage1.0.rbr_dense.conv.weight", "stage2.1.rbr_identity.running_mean", "linear.bias"])
def test_value_that_is_no_number_is_named(value: float, key: str, state: State, save: Save) -> None:
    state[key].view(-1)[-1] = value
    assert key in refused(save(state), "contains NaN or Inf").message


def test_negative_variance_is_named(state: State, save: Save) -> None:
    state["stage2.0.rbr_1x1.bn.running_var"][3] = -1e-3
    refused(save(state), r"stage2\.0\.rbr_1x1\.bn\.running_var has a negative variance \(-0\.001\)")


def test_zero_variance_is_no_error(state: State, save: Save) -> None:
    state["stage2.0.rbr_1x1.bn.running_var"][3] = 0
    assert load_checkpoint(save(state)).tensors["stages.2.0.branch_1x1.bn.running_var"][3] == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensor_of_another_type_is_named(dtype: torch.dtype, state: State, save: Save) -> None:
    state["stage1.0.rbr_dense.conv.weight"] = state["stage1.0.rbr_dense.conv.weight"].to(dtype)
    refused(save(state), r"stage1\.0\.rbr_dense\.conv\.weight is not a floating-point tensor")


def test_sparse_tensor_is_named(state: State, save: Save) -> None:
    state["linear.weight"] = state["linear.weight"].to_sparse()
    refused(save(state), r"linear\.weight is a sparse or quantized tensor")


def test_tensor_without_values_is_named(state: State, save: Save) -> None:
    state["linear.weight"] = state["linear.weight"].to("meta")
    refused(save(state), r"linear\.weight has a shape, but no values")


@pytest.mark.parametrize("index", ["99999999", "9" * 5000, "01"])
def test_strange_block_number_is_no_block(index: str, state: State, save: Save) -> None:
    state[f"stage1.{index}.rbr_dense.conv.weight"] = torch.ones(8, 8, 3, 3)
    refused(save(state), r"1 tensor does not belong to the net")


@pytest.mark.slow
def test_block_far_behind_the_last_means_that_those_between_are_missing(state: State, save: Save) -> None:
    state["stage1.9999.rbr_dense.conv.weight"] = torch.ones(8, 8, 3, 3)
    refused(save(state), r"missing: stage1\.2\.rbr_dense\.conv\.weight")


@pytest.mark.parametrize("spelling", ["A0", "RepVGG-A0", "repvgg_a0", "a0", "REPVGG-a0"])
def test_arch_is_accepted_in_any_spelling(spelling: str, save: Save) -> None:
    assert load_checkpoint(save(card_state("A0")), spelling).arch == "RepVGG-A0"


@pytest.mark.parametrize(("holds", "wanted"), [("A0", "A1"), ("B1g4", "B1"), ("B1", "B1g2"), ("D2se", "B2")])
def test_wrong_arch_is_answered_with_the_right_one(holds: str, wanted: str, save: Save) -> None:
    refused(save(card_state(holds)), f"contains RepVGG-{holds}, not RepVGG-{wanted}$", wanted)


def test_custom_arch_is_described_where_a_card_was_asked_for(checkpoint_file: Path) -> None:
    refused(checkpoint_file, r"contains custom RepVGG \(blocks 2,2,4,1; widths 8,8,12,16,24\), not RepVGG-A0", "A0")


@pytest.mark.parametrize("arch", ["C7", "", "A", "resnet50"])
def test_unknown_arch_is_answered_with_the_list(arch: str, checkpoint_file: Path) -> None:
    with pytest.raises(DeployError, match="no architecture is called") as caught:
        load_checkpoint(checkpoint_file, arch)
    assert "A0" in caught.value.hint
    assert "B3g4" in caught.value.hint


@pytest.mark.parametrize("part", ["rbr_identity", "rbr_1x1"])
def test_a_branch_that_is_missing_in_all_blocks_is_missing(part: str, state: State, save: Save) -> None:
    kept = {key: value for key, value in state.items() if part not in key}
    assert part in refused(save(kept), "tensors are missing").message


def test_a_misspelt_kernel_is_found_beside_the_right_name(state: State, save: Save) -> None:
    state["stage2.1.rbr_dens.conv.weight"] = state.pop("stage2.1.rbr_dense.conv.weight")
    refused(save(state), r"stage2.1.rbr_dense.conv.weight \(nearest: stage2.1.rbr_dens.conv.weight\)")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_of_tensors_is_read(protocol: int, state: State, tmp_path: Path) -> None:
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps({"model": state, "where": pathlib.Path("x")}, protocol))
    loaded = load_checkpoint(path).tensors
    assert torch.equal(loaded["classifier.weight"], state["linear.weight"])
