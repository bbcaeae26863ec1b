"""Which library's checkpoint it is, in which form, and that its tensors land where they belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.small_nets import NETS, logits_of, make_net, name_in_layout, relative
from torch import Tensor

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.cards import describe
from repvgg_deploy.nets.cost import count_parameters
from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG
from repvgg_deploy.nets.spec import SqueezeExcite
from repvgg_deploy.workflows.export import ExportRequest, export

GOLDEN = [
    "holocron_train",
    "official_ddp_wrapped",
    "official_deploy",
    "official_grouped",
    "official_se",
    "official_train",
    "openmmlab_train",
    "qarepvgg_v2_train",
    "repvggplus_train",
    "timm_train",
]
DEPLOY_LAYOUTS = ["official", "official-plus", "timm", "openmmlab", "holocron"]
Save = Callable[..., Path]


class Golden:
    def __init__(self, folder: Path, name: str) -> None:
        self.facts = json.loads((folder / f"{name}.json").read_text())
        self.path = folder / self.facts["checkpoint"]
        arrays = np.load(folder / f"{name}.npz")
        self.images, self.logits = arrays["images"], arrays["logits"]
        # The logits are the training form's; a deploy form has been rounded to float32 by who saved it.
        self.tolerance = 1e-12 if self.facts["form"] == "train" else 2e-6

    def error(self, logits: np.ndarray) -> float:
        return float(np.linalg.norm(logits.astype(np.float64) - self.logits) / np.linalg.norm(self.logits))


@pytest.fixture(params=GOLDEN)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    return Golden(shared / "golden", request.param)


def test_all_golden_files_are_tested(shared: Path) -> None:
    assert sorted(path.stem for path in (shared / "golden").glob("*.json")) == GOLDEN


def test_golden_file_is_recognized(golden: Golden) -> None:
    checkpoint = load_checkpoint(golden.path)
    found = (checkpoint.layout, checkpoint.form, checkpoint.sha256)
    assert found == tuple(golden.facts[key] for key in ("layout", "form", "sha256"))


def test_golden_file_gives_its_logits_in_float64(golden: Golden) -> None:
    net = build(load_checkpoint(golden.path))
    assert golden.error(logits_of(net, torch.from_numpy(golden.images)).numpy()) < golden.tolerance


def test_golden_file_fused_in_float64_gives_its_logits(golden: Golden) -> None:
    fused = fuse(build(load_checkpoint(golden.path)), torch.float64)
    assert all(isinstance(block, FusedBlock) for block in fused.blocks())
    assert golden.error(fused(torch.from_numpy(golden.images).double()).detach().numpy()) < golden.tolerance


@pytest.mark.slow
def test_golden_file_gives_its_logits_through_onnx_runtime(golden: Golden, tmp_path: Path) -> None:
    request = ExportRequest(golden.path, tmp_path, preprocessing=PreprocessingOptions(size=(64, 64)))
    session = onnxruntime.InferenceSession(export(request).onnx, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": golden.images})
    assert golden.error(logits) <= 5e-6


@pytest.mark.parametrize("layout", NETS)
def test_training_form_of_every_layout_loads(layout: str, save: Save, images: Tensor) -> None:
    net = make_net(seed=1, **NETS[layout])
    checkpoint = load_checkpoint(save(name_in_layout(net, layout)))
    assert (checkpoint.layout, checkpoint.form, checkpoint.spec) == (layout, "train", net.spec)
    assert torch.equal(build(checkpoint)(images), net(images))


@pytest.mark.parametrize("layout", DEPLOY_LAYOUTS)
def test_deploy_form_of_every_layout_loads(layout: str, save: Save, images: Tensor) -> None:
    fused = cast(RepVGG, fuse(make_net(seed=1, **NETS[layout])))
    checkpoint = load_checkpoint(save(name_in_layout(fused, layout)))
    assert (checkpoint.layout, checkpoint.form, checkpoint.spec) == (layout, "deploy", fused.spec)
    assert torch.equal(build(checkpoint)(images), fused(images))


@pytest.mark.parametrize("layout", ["qarepvgg-v1", "qarepvgg-v2"])
def test_deploy_form_of_a_qarepvgg_is_that_of_the_official_code(layout: str, save: Save, images: Tensor) -> None:
    fused = cast(RepVGG, fuse(make_net(**NETS[layout])))
    checkpoint = load_checkpoint(save(name_in_layout(fused, layout)))
    assert (checkpoint.layout, checkpoint.form) == ("official", "deploy")
    assert torch.equal(build(checkpoint)(images), fused(images))


def test_repoptimizers_net_whose_bns_are_folded_into_the_convolutions_is_a_deploy_form(
    save: Save, images: Tensor
) -> None:
    fused = cast(RepVGG, fuse(make_net(**NETS["repoptimizers"])))
    checkpoint = load_checkpoint(save(name_in_layout(fused, "repoptimizers")))
    assert (checkpoint.layout, checkpoint.form) == ("repoptimizers", "deploy")
    assert torch.equal(build(checkpoint)(images), fused(images))


def test_file_name_plays_no_part(save: Save) -> None:
    path = save(name_in_layout(make_net(**NETS["timm"]), "timm"), "official_repvgg_deploy_holocron.pth")
    assert load_checkpoint(path).layout == "timm"


@pytest.mark.parametrize("in_channels", [1, 4])
def test_any_number_of_input_channels_is_read_from_the_stem(in_channels: int, save: Save) -> None:
    net = make_net(in_channels=in_channels)
    assert load_checkpoint(save(name_in_layout(net, "official"))).spec == net.spec


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_groups_are_read_from_the_kernels(groups: int, form: str, save: Save) -> None:
    net = make_net(groups=groups)
    net = cast(RepVGG, fuse(net)) if form == "deploy" else net
    assert load_checkpoint(save(name_in_layout(net, "official"))).spec == net.spec


def test_any_depth_and_number_of_stages_is_read(save: Save) -> None:
    net = make_net(blocks=(1, 3), widths=(8, 16, 8))
    checkpoint = load_checkpoint(save(name_in_layout(net, "official")))
    assert checkpoint.spec == net.spec
    assert checkpoint.arch == "custom RepVGG (blocks 1,3; widths 8,16,8)"


def test_squeeze_excite_of_openmmlab_stands_before_the_relu(save: Save) -> None:
    net = make_net(**NETS["openmmlab"])
    spec = load_checkpoint(save(name_in_layout(net, "openmmlab"))).spec
    assert {block.squeeze_excite for block in spec.blocks} == {SqueezeExcite(4, "before")}


def test_repvggplus_joins_the_halves_of_stage_3(save: Save) -> None:
    net = make_net(blocks=(1, 1, 5, 1), squeeze_excite=SqueezeExcite(2, "after"))
    named = name_in_layout(net, "official-plus")
    assert {key.split(".")[0] for key in named} >= {"stage3_first", "stage3_second"}
    checkpoint = load_checkpoint(save(named))
    assert [len(stage) for stage in checkpoint.spec.stages] == [1, 1, 1, 5, 1]
    assert [block.stride for block in checkpoint.spec.stages[3]] == [2, 1, 1, 1, 1]


def test_auxiliary_heads_of_repvggplus_are_dropped_and_said_so(save: Save) -> None:
    named = name_in_layout(make_net(**NETS["official-plus"]), "official-plus")
    named |= {"stage1_aux.0.weight": torch.ones(4, 8, 3, 3), "stage1_aux.2.bias": torch.ones(4)}
    checkpoint = load_checkpoint(save(named))
    assert checkpoint.notes == ("2 tensors that are needed only for training were left out (stage1_aux.0.weight, …)",)


def test_qarepvgg_with_squeeze_excite_is_refused(save: Save) -> None:
    net = make_net(norm_after_sum=True, squeeze_excite=SqueezeExcite(4))
    path = save(name_in_layout(net, "qarepvgg-v1"))
    with pytest.raises(CheckpointError, match="squeeze-excite between the branches and the BN") as caught:
        load_checkpoint(path)
    assert "no equivalent convolution" in caught.value.hint


@pytest.mark.slow
def test_holocron_a0_with_ten_classes_has_the_published_number_of_parameters(save: Save) -> None:
    counts, widths = (2, 3, 5, 15, 2), (48, 48, 96, 192, 1280)
    net = make_net(blocks=counts[1:], widths=widths, classes=10)
    state = name_in_layout(net, "holocron")
    # The stem stage has a second block as well: the first of stage 0 with an identity, from 48 to 48 channels.
    state |= {
        key.replace("features.1.1.", "features.0.1."): tensor.clone()
        for key, tensor in state.items()
        if key.startswith("features.1.1.")
    }
    checkpoint = load_checkpoint(save(state))
    assert checkpoint.arch == "RepVGG-A0 (one block more in every stage)"
    assert count_parameters(checkpoint.spec) == 24_741_642


@pytest.mark.slow
def test_timm_training_state_gives_timms_logits(timm: ModuleType, save: Save) -> None:
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0", num_classes=7).eval()
    checkpoint = load_checkpoint(save(model.state_dict()), arch="A0")
    x = torch.randn(2, 3, 64, 64)
    assert checkpoint.layout == "timm"
    assert describe(checkpoint.spec) == "RepVGG-A0"
    assert relative(logits_of(build(checkpoint), x), logits_of(model, x)) < 1e-12


@pytest.mark.slow
def test_timm_d2se_has_its_squeeze_excites_in_every_block(timm: ModuleType, save: Save) -> None:
    with torch.device("meta"):
        names = timm.create_model("repvgg_d2se", num_classes=3).state_dict()
    path = save({key: torch.zeros(()).expand(tensor.shape) for key, tensor in names.items()})
    with pytest.raises(CheckpointError, match=r"contains RepVGG-D2se, not RepVGG-A0"):
        load_checkpoint(path, arch="A0")
