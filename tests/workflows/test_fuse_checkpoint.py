"""`fuse` as a command: what it writes is loaded by the official code's names, by timm, and by this package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.small_nets import NETS, logits_of, make_net, name_in_layout, randomize, relative
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from repvgg_deploy.checkpoints import CheckpointOptions, build, load_checkpoint
from repvgg_deploy.errors import CheckpointError, DeployError, VerificationError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.settings import StructureOptions
from repvgg_deploy.nets.spec import SqueezeExcite
from repvgg_deploy.workflows.fuse_checkpoint import write_fused

Save = Callable[..., Path]
State = dict[str, Tensor]


def load(path: Path) -> State:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_official_names_are_those_that_the_official_code_loads(
    ending: str, checkpoint_file: Path, tmp_path: Path
) -> None:
    target = tmp_path / f"fused{ending}"
    write_fused(checkpoint_file, target)
    blocks = ["stage0", "stage1.0", "stage1.1", "stage2.0", "stage2.1", *(f"stage3.{b}" for b in range(4)), "stage4.0"]
    names = {f"{block}.rbr_reparam.{leaf}" for block in blocks for leaf in ("weight", "bias")}
    assert load(target).keys() == names | {"linear.weight", "linear.bias"}


def test_shapes_are_those_of_a_convolution_with_bias(checkpoint_file: Path, tmp_path: Path) -> None:
    write_fused(checkpoint_file, tmp_path / "fused.pth")
    state = load(tmp_path / "fused.pth")
    assert state["stage2.0.rbr_reparam.weight"].shape == (12, 8, 3, 3)
    assert state["stage2.0.rbr_reparam.bias"].shape == (12,)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("layout", NETS)
@pytest.mark.slow
def test_every_layout_becomes_a_deploy_form_with_the_same_logits(
    layout: str, save: Save, tmp_path: Path, images: Tensor
) -> None:
    net = make_net(**NETS[layout])
    written = write_fused(save(name_in_layout(net, layout)), tmp_path / "fused.safetensors")
    again = load_checkpoint(written.path)
    assert again.form == "deploy"
    assert relative(logits_of(build(again), images), logits_of(net, images)) < 1e-6


def test_report_holds_what_was_measured(checkpoint_file: Path, tmp_path: Path) -> None:
    written = write_fused(checkpoint_file, tmp_path / "fused.pth")
    count = sum(tensor.numel() for tensor in load(written.path).values())
    assert (written.layout, written.parameters) == ("official", count)
    assert 0 < written.parity.relative < 1e-5
    assert written.parity.images > 1


def test_grouped_net_keeps_its_groups(save: Save, tmp_path: Path) -> None:
    net = make_net(groups=4)
    write_fused(save(name_in_layout(net, "official")), tmp_path / "fused.pth")
    assert load_checkpoint(tmp_path / "fused.pth").spec == net.spec.fused()


def test_deploy_form_is_written_as_it_was(net, save: Save, tmp_path: Path) -> None:
    state = name_in_layout(fuse(net), "official")
    write_fused(save(state), tmp_path / "again.pth")
    again = load(tmp_path / "again.pth")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused.safetensors", "fused.pth"])
def test_written_file_is_the_same_each_time(name: str, checkpoint_file: Path, tmp_path: Path) -> None:
    first, second = (write_fused(checkpoint_file, tmp_path / folder / name).path for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("source", "layout"), [("timm", "timm"), ("official", "official"), ("holocron", "official")])
@pytest.mark.slow
def test_layout_is_timms_for_a_checkpoint_from_timm_and_official_for_others(
    source: str, layout: str, save: Save, tmp_path: Path
) -> None:
    path = save(name_in_layout(make_net(), source))
    assert write_fused(path, tmp_path / "fused.pth").layout == layout
    assert load_checkpoint(tmp_path / "fused.pth").layout == layout


@pytest.mark.parametrize("layout", ["official", "timm"])
def test_layout_can_be_chosen(layout: str, checkpoint_file: Path, tmp_path: Path) -> None:
    write_fused(checkpoint_file, tmp_path / "fused.pth", layout)
    assert load_checkpoint(tmp_path / "fused.pth").layout == layout


def test_repvggplus_gets_its_halves_of_stage_3_back(save: Save, tmp_path: Path) -> None:
    net = make_net(blocks=(1, 1, 5, 1), squeeze_excite=SqueezeExcite(2, "after"))
    write_fused(save(name_in_layout(net, "official-plus")), tmp_path / "fused.pth")
    assert load(tmp_path / "fused.pth").keys() == name_in_layout(fuse(net), "official-plus").keys()


def test_squeeze_excite_after_the_relu_has_no_place_in_timm(save: Save, tmp_path: Path) -> None:
    path = save(name_in_layout(make_net(**NETS["official-plus"]), "official-plus"))
    with pytest.raises(CheckpointError, match="timm layout has no name for"):
        write_fused(path, tmp_path / "out" / "fused.pth", "timm")
    assert not (tmp_path / "out").exists()


def test_class_names_travel_in_safetensors(state: State, save: Save, tmp_path: Path) -> None:
    names = ["ant", "bée", "cow", "dog", "eel"]
    write_fused(save({"state_dict": state, "classes": names}), tmp_path / "fused.safetensors")
    assert load_checkpoint(tmp_path / "fused.safetensors").class_names == tuple(names)


def test_metadata_of_safetensors_says_nothing_of_unknown_classes(checkpoint_file: Path, tmp_path: Path) -> None:
    write_fused(checkpoint_file, tmp_path / "fused.safetensors")
    with safe_open(tmp_path / "fused.safetensors", "pt") as file:
        assert not file.metadata()


def test_tensors_that_share_one_storage_are_written_each_by_itself(net, save: Save, tmp_path: Path) -> None:
    state = name_in_layout(fuse(net), "official")
    flat, views, start = torch.cat([t.reshape(-1) for t in state.values()]), {}, 0
    for key, tensor in state.items():
        views[key] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    path = save(views)
    for ending in (".safetensors", ".pth"):
        write_fused(path, tmp_path / f"fused{ending}")
        written = load(tmp_path / f"fused{ending}")
        assert all(torch.equal(written[key], state[key]) for key in state)


def test_ema_copy_is_fused_on_request(state: State, save: Save, tmp_path: Path, images: Tensor) -> None:
    averaged = make_net(seed=5)
    path = save({"model": state, "model_ema": name_in_layout(averaged, "official")})
    write_fused(path, tmp_path / "fused.pth", options=CheckpointOptions(ema=True))
    fused = build(load_checkpoint(tmp_path / "fused.pth"))
    assert relative(logits_of(fused, images), logits_of(averaged, images)) < 1e-6


def test_epsilon_of_the_bns_can_be_given(net, checkpoint_file: Path, tmp_path: Path) -> None:
    options = CheckpointOptions(structure=StructureOptions(bn_eps=0.1))
    write_fused(checkpoint_file, tmp_path / "fused.pth", options=options)
    stem, bias = net.stages[0][0], load(tmp_path / "fused.pth")["stage0.rbr_reparam.bias"]
    expected = torch.zeros(8)
    for branch in (stem.branch_3x3.bn, stem.branch_1x1.bn):
        expected += branch.bias - branch.running_mean * branch.weight / (branch.running_var + 0.1).sqrt()
    assert torch.allclose(bias, expected, atol=1e-6)


def test_the_checkpoint_is_never_replaced_by_its_deploy_form(checkpoint_file: Path, tmp_path: Path) -> None:
    before = checkpoint_file.read_bytes()
    (tmp_path / "link.pth").symlink_to(checkpoint_file)
    for target in (checkpoint_file, tmp_path / "link.pth"):
        with pytest.raises(DeployError, match="is the checkpoint itself"):
            write_fused(checkpoint_file, target)
    assert checkpoint_file.read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a file's size is one of Linux")
@pytest.mark.parametrize("name", ["fused.pth", "fused.safetensors"])
def test_a_full_disk_is_an_error_and_leaves_the_older_file(name: str, checkpoint_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_bytes(b"older")
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from repvgg_deploy.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "fuse", str(checkpoint_file), "-o", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "error: cannot write to" in done.stderr
    assert "hint: " in done.stderr
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [(name, b"older")]


def test_directory_as_target_is_an_error(checkpoint_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="is a directory"):
        write_fused(checkpoint_file, tmp_path)


@pytest.mark.slow
def test_written_file_that_does_not_agree_is_not_kept(
    checkpoint_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repvgg_deploy.workflows import fuse_checkpoint as deploy_form

    write = deploy_form.write_state_dict

    def damage(state: State, *rest: object) -> None:
        write({key: tensor * 1.01 for key, tensor in state.items()}, *rest)

    monkeypatch.setattr(deploy_form, "write_state_dict", damage)
    target = tmp_path / "out" / "fused.pth"
    with pytest.raises(VerificationError, match="the written file: the outputs differ"):
        write_fused(checkpoint_file, target)
    assert not target.parent.exists()


def _loads_in_timm(timm: ModuleType, model: nn.Module, twin: nn.Module, source: Path, target: Path) -> bool:
    """Whether `twin` in timm's own deploy form loads the fused file of `model` and gives the logits of `model`."""
    x = torch.randn(2, 3, 32, 32)
    write_fused(source, target)
    deployed = timm.utils.model.reparameterize_model(twin)
    deployed.load_state_dict(load(target), strict=True)
    return relative(logits_of(deployed, x), logits_of(model, x)) < 1e-6


@pytest.mark.slow
def test_timm_loads_the_fused_file_strictly_and_gives_the_same_logits(
    timm: ModuleType, save: Save, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model, twin = (timm.create_model("repvgg_a0", num_classes=6).eval() for _ in range(2))
    source = save(model.state_dict(), "timm.safetensors")
    assert _loads_in_timm(timm, model, twin, source, tmp_path / "fused.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("attention", [None, "se"])
def test_timm_loads_grouped_nets_and_such_with_squeeze_excite(
    attention: str | None, timm: ModuleType, save: Save, tmp_path: Path
) -> None:
    byob = timm.models.byobnet
    blocks = tuple(byob.ByoBlockCfg(type="rep", d=2, c=width, s=2, gs=8) for width in (8, 16, 16, 32))
    config = byob.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8, attn_layer=attention)
    model, twin = (byob.ByobNet(config, num_classes=6).eval() for _ in range(2))
    randomize(model)
    source = save(model.state_dict())
    assert {b.groups for b in load_checkpoint(source).spec.blocks} > {1, 2}
    assert _loads_in_timm(timm, model, twin, source, tmp_path / "fused.pth")


@pytest.mark.slow
def test_fused_file_of_timm_itself_loads_here(timm: ModuleType, save: Save) -> None:
    model = timm.create_model("repvgg_a0", num_classes=6).eval()
    deployed = timm.utils.model.reparameterize_model(model)
    checkpoint = load_checkpoint(save(deployed.state_dict()))
    x = torch.randn(2, 3, 32, 32)
    assert (checkpoint.layout, checkpoint.form, checkpoint.arch) == ("timm", "deploy", "RepVGG-A0")
    assert relative(logits_of(build(checkpoint), x), logits_of(model, x)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official", "timm"])
def test_a_stem_of_two_blocks_has_no_place_in_either_layout(layout: str, shared: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="one block in its stem, but the net has 2"):
        write_fused(shared / "golden" / "holocron_train.pth", tmp_path / "fused.pth", layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_written_file_may_be_read_by_whom_any_new_file_may(
    ending: str, checkpoint_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").touch()
    write_fused(checkpoint_file, tmp_path / f"fused.{ending}")
    assert (tmp_path / f"fused.{ending}").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_another_ending_is_refused(checkpoint_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="has no file extension of a checkpoint"):
        write_fused(checkpoint_file, tmp_path / "fused.onnx")
