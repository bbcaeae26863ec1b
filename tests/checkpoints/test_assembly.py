"""What is beside a net is left out with a note; what looks like part of it, or claims too much, is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.small_nets import make_net, name_in_layout
from torch import Tensor

from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.errors import CheckpointError

Save = Callable[..., Path]
State = dict[str, Tensor]

BESIDE = {
    "criterion.weight": (5,),
    "criterion.pos_weight": (5,),
    "loss_fn.centers": (5, 24),
    "mean": (1, 3, 1, 1),
    "std": (1, 3, 1, 1),
    "normalize.mean": (3,),
    "queue": (128, 4096),
    "queue_ptr": (1,),
    "train_acc.correct": (),
    "val_metric.confmat": (5, 5),
    "log_vars": (2,),
    "temperature": (1,),
    "projector.0.weight": (16, 24),
    "aux_head.fc.weight": (5, 12),
}


@pytest.mark.parametrize("key", BESIDE)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_tensor_beside_the_net_is_left_out_with_a_note(key: str, prefix: str, state: State, save: Save) -> None:
    inside = {prefix + name: tensor for name, tensor in state.items()}
    checkpoint = load_checkpoint(save({"state_dict": inside | {key: torch.ones(BESIDE[key])}}))
    assert torch.equal(checkpoint.tensors["classifier.weight"], state["linear.weight"])
    assert checkpoint.notes == (f"1 tensor outside the net was left out: {key}",)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("stage2.1.rbr_extra.conv.weight", (12, 12, 3, 3)),
        ("stage12.0.rbr_dense.conv.weight", (12, 3, 3, 3)),
        ("stage2.1.scale", (1,)),
        ("stage0.rbr_dense.extra", (1,)),
        ("neck.conv.weight", (24, 24, 3, 3)),
        ("norm.running_var", (24,)),
        ("attention.weight", (24, 24)),
    ],
)
def test_surplus_tensor_that_looks_like_part_of_the_net_is_an_error(
    key: str, shape: tuple[int, ...], state: State, save: Save
) -> None:
    with pytest.raises(CheckpointError, match=rf"1 tensor does not belong to the net: {key}"):
        load_checkpoint(save(state | {key: torch.ones(shape)}))


def test_batch_norm_behind_the_backbone_is_an_error_and_not_left_out(state: State, save: Save) -> None:
    norm = {f"final_norm.{leaf}": torch.ones(24) for leaf in ("weight", "bias", "running_mean", "running_var")}
    blocks = {f"backbone.{key}": tensor for key, tensor in state.items() if not key.startswith("linear.")}
    head = {f"head.fc.{leaf}": state[f"linear.{leaf}"] for leaf in ("weight", "bias")}
    with pytest.raises(CheckpointError, match="final_norm"):
        load_checkpoint(save(blocks | norm | head))


def test_tensors_that_claim_gigabytes_are_refused_before_memory_is_taken(save: Save) -> None:
    net = make_net(blocks=(1, 1), widths=(8, 8, 8), classes=2)
    state = name_in_layout(net, "official")
    wide = {key: torch.ones(()).expand([1 << 14 if n == 8 else n for n in t.shape]) for key, t in state.items()}
    with pytest.raises(CheckpointError, match="the tensors claim"):
        load_checkpoint(save(wide))


def test_thousands_of_input_channels_are_refused(save: Save) -> None:
    state = name_in_layout(make_net(blocks=(1, 1), widths=(4, 4, 4), in_channels=3000), "official")
    with pytest.raises(CheckpointError, match="takes 3000 channels"):
        load_checkpoint(save(state))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensor_is_named(state: State, save: Save) -> None:
    state["linear.weight"] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(CheckpointError, match=r"linear\.weight is a nested tensor"):
        load_checkpoint(save(state))


def test_names_that_would_drive_a_terminal_are_escaped(state: State, save: Save) -> None:
    state["stage2.1.\x1b[31m\nerror: forged\ud800.conv.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(save(state))
    assert caught.value.message.isprintable()
    assert "\\x1b[31m\\nerror: forged\\ud800" in caught.value.message


def test_class_names_that_no_file_can_hold_are_left_out(state: State, save: Save) -> None:
    assert load_checkpoint(save({"classes": ["a", "b", "c", "d", "\ud800"], "model": state})).class_names is None


def test_frozen_batch_norms_load(state: State, save: Save) -> None:
    # torchvision's and detectron2's have no num_batches_tracked, and all four tensors are buffers.
    frozen = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    assert load_checkpoint(save(frozen)).notes == ()
