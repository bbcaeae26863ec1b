"""Wrapped and prefixed state dicts, EMA copies, containers and number formats."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_nets import make_net, name_in_layout
from torch import Tensor, nn

from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.nets.repvgg import RepVGG

Save = Callable[..., Path]
State = dict[str, Tensor]


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def loaded(path: Path, **options: Any) -> State:
    return dict(load_checkpoint(path, **options).tensors)


def same(tensors: State, net: RepVGG) -> bool:
    expected = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[k], v) for k, v in expected.items())


@pytest.fixture
def averaged() -> RepVGG:
    """Another net of the same architecture, to play the EMA copy."""
    return make_net(seed=99)


@pytest.mark.parametrize(
    "place",
    ["state_dict", "model", "model_ema", "ema", "state_dict_ema", "ema_state_dict", "checkpoint.model.state_dict"],
)
def test_state_dict_is_found_wherever_it_lies(place: str, net: RepVGG, state: State, save: Save) -> None:
    value: dict[str, Any] = state
    for key in reversed(place.split(".")):
        value = {"epoch": 3, key: value, "note": "x"}
    assert same(loaded(save(value)), net)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "backbone.",
        "timm_model.",
        "_orig_mod.",
        "model.",
        "module.model.",
        "_orig_mod.module.",
        "module._orig_mod.model.backbone.",
    ],
)
def test_prefixes_are_stripped(prefix: str, net: RepVGG, state: State, save: Save) -> None:
    assert same(loaded(save({"state_dict": prefixed(state, prefix)})), net)


def test_head_outside_the_backbone_prefix_is_found(save: Save, net: RepVGG) -> None:
    state = name_in_layout(net, "openmmlab")
    assert {key.split(".")[0] for key in state} == {"backbone", "head"}
    assert same(loaded(save({"meta": {}, "state_dict": prefixed(state, "module.")})), net)


def test_plain_weights_are_taken_by_default_and_the_ema_copy_is_pointed_out(
    net: RepVGG, averaged: RepVGG, state: State, save: Save
) -> None:
    path = save({"model_ema": name_in_layout(averaged, "official"), "model": state})
    checkpoint = load_checkpoint(path)
    assert same(dict(checkpoint.tensors), net)
    assert checkpoint.is_ema is False
    assert checkpoint.notes == ("the file also has an EMA copy; --ema selects it",)


def _as_places(plain: State, ema: State) -> dict[str, Any]:
    return {"state_dict": plain, "state_dict_ema": ema}


def _as_nested_places(plain: State, ema: State) -> dict[str, Any]:
    return {"checkpoint": {"ema": {"state_dict": prefixed(ema, "module.")}, "state_dict": plain}}


def _as_lightning(plain: State, ema: State) -> dict[str, Any]:
    return {"state_dict": prefixed(plain, "model.") | prefixed(ema, "model_ema.")}


def _as_lightning_with_module(plain: State, ema: State) -> dict[str, Any]:
    return {"state_dict": prefixed(plain, "model.") | prefixed(ema, "ema_model.module.")}


def _as_inner_ema(plain: State, ema: State) -> dict[str, Any]:
    return {"state_dict": prefixed(plain, "module.model.") | prefixed(ema, "module.ema.model.")}


def _as_torch_averaged_model(plain: State, ema: State) -> dict[str, Any]:
    return {"model": plain, "model_ema": {"n_averaged": torch.tensor(7), **prefixed(ema, "module.")}}


BOTH = [
    _as_places,
    _as_nested_places,
    _as_lightning,
    _as_lightning_with_module,
    _as_inner_ema,
    _as_torch_averaged_model,
]


@pytest.mark.parametrize("arrange", BOTH)
@pytest.mark.parametrize("ema", [True, False, None])
def test_ema_option_chooses_between_the_copies(
    arrange: Callable[[State, State], Any],
    ema: bool | None,
    net: RepVGG,
    averaged: RepVGG,
    state: State,
    save: Save,
) -> None:
    checkpoint = load_checkpoint(save(arrange(state, name_in_layout(averaged, "official"))), ema=ema)
    assert checkpoint.is_ema is bool(ema)
    assert same(dict(checkpoint.tensors), averaged if ema else net)


def test_lone_ema_copy_is_taken_and_said_so(net: RepVGG, state: State, save: Save) -> None:
    checkpoint = load_checkpoint(save({"state_dict_ema": state}))
    assert same(dict(checkpoint.tensors), net)
    assert checkpoint.is_ema
    assert checkpoint.notes == ("the file has only an EMA copy, which was used",)


def test_ema_is_an_error_where_there_is_none(checkpoint_file: Path) -> None:
    with pytest.raises(CheckpointError, match="has no EMA copy"):
        load_checkpoint(checkpoint_file, ema=True)


def test_no_ema_is_an_error_where_there_is_nothing_else(state: State, save: Save) -> None:
    with pytest.raises(CheckpointError, match="only an EMA copy"):
        load_checkpoint(save({"ema": state}), ema=False)


@pytest.mark.parametrize("ema", [True, False, None])
def test_mmengine_saves_the_averaged_weights_as_state_dict(
    ema: bool | None, net: RepVGG, averaged: RepVGG, save: Save
) -> None:
    value = {
        "meta": {"mmengine_version": "0.10.4"},
        "state_dict": name_in_layout(averaged, "openmmlab"),
        "ema_state_dict": {"steps": torch.tensor(9), **prefixed(name_in_layout(net, "openmmlab"), "module.")},
    }
    checkpoint = load_checkpoint(save(value), ema=ema)
    assert same(dict(checkpoint.tensors), net if ema is False else averaged)
    assert checkpoint.is_ema is (ema is not False)


def test_optimizer_state_under_the_same_names_is_not_mistaken_for_the_weights(
    net: RepVGG, state: State, save: Save
) -> None:
    momentum = {key: torch.zeros_like(t) for key, t in state.items() if key.endswith("weight")}
    assert same(loaded(save({"momentum": momentum, "state_dict": state})), net)


def test_names_that_clash_without_their_wrapper_are_not_mixed(state: State, save: Save) -> None:
    path = save(state | prefixed({key: tensor + 1 for key, tensor in state.items()}, "module."))
    with pytest.raises(CheckpointError, match=r"contains 2 nets: '' \(custom RepVGG .*\), module \(custom") as caught:
        load_checkpoint(path)
    assert "--net" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.pth", {}),
        ("a.pt", {}),
        ("a.pth.tar", {}),
        ("a", {}),
        ("a.pth", {"_use_new_zipfile_serialization": False}),
        ("a.pth.tar", {"_use_new_zipfile_serialization": False}),
        ("a.safetensors", {}),
    ],
)
def test_every_container_is_read(name: str, options: dict[str, Any], net: RepVGG, state: State, save: Save) -> None:
    assert same(loaded(save(state, name, **options)), net)


@pytest.mark.parametrize(("name", "other"), [("a.safetensors", "b.pth"), ("a.pth", "b.safetensors"), ("a.pt", "b.onx")])
def test_container_is_told_by_its_content_not_its_ending(
    name: str, other: str, net: RepVGG, state: State, save: Save
) -> None:
    path = save(state, name)
    assert same(loaded(path.rename(path.with_name(other))), net)


def test_sha256_is_that_of_the_file(checkpoint_file: Path) -> None:
    import hashlib

    assert load_checkpoint(checkpoint_file).sha256 == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_half_precision_becomes_float32(dtype: torch.dtype, name: str, state: State, save: Save) -> None:
    half = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}
    tensors = loaded(save(half, name))
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["classifier.weight"], half["linear.weight"].float())


def test_float64_stays_float64(state: State, save: Save) -> None:
    wide = {key: t.double() + 1e-12 if t.is_floating_point() else t for key, t in state.items()}
    tensors = loaded(save(wide))
    assert {t.dtype for t in tensors.values()} == {torch.float64}
    assert torch.equal(tensors["classifier.weight"], wide["linear.weight"])


def test_missing_num_batches_tracked_is_no_loss(net: RepVGG, state: State, save: Save, images: Tensor) -> None:
    old = {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}
    assert torch.equal(build(load_checkpoint(save(old)))(images), net(images))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_saved_on_a_gpu_come_to_the_cpu(
    zipped: bool, net: RepVGG, state: State, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:3")
    path = save(state, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert b"cuda:3" in path.read_bytes()
    assert same(loaded(path), net)


def test_parameters_with_gradients_are_as_good_as_tensors(net: RepVGG, state: State, save: Save) -> None:
    value = {key: nn.Parameter(t) if t.is_floating_point() else t for key, t in state.items()}
    path = save(value)
    assert same(loaded(path), net)
    assert not any(p.requires_grad for p in build(load_checkpoint(path)).parameters())


def test_channels_last_and_shared_storage_do_not_matter(net: RepVGG, state: State, save: Save, images: Tensor) -> None:
    flat = torch.cat([tensor.reshape(-1).float() for tensor in state.values()])
    views, start = {}, 0
    for key, tensor in state.items():
        views[key] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
        if tensor.ndim == 4 and tensor.shape[1] > 3:
            views[key] = tensor.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(build(load_checkpoint(save(views)))(images), net(images), rtol=1e-5, atol=1e-6)


def test_the_stride_of_a_single_number_does_not_matter(state: State, save: Save) -> None:
    kernel = state["stage0.rbr_1x1.conv.weight"]
    odd = kernel.as_strided(kernel.shape, (*kernel.stride()[:2], 1 << 61, 1 << 61))
    found = loaded(save({**state, "stage0.rbr_1x1.conv.weight": odd}))
    assert torch.equal(found["stages.0.0.branch_1x1.conv.weight"], kernel)


def test_what_training_scripts_save_beside_the_weights_is_no_obstacle(net: RepVGG, state: State, save: Save) -> None:
    value = {
        "args": argparse.Namespace(lr=0.1, arch="x"),
        "best_acc1": np.float64(72.4),
        "epoch": np.int64(120),
        "improved": np.bool_(True),
        "loss": np.float32(0.5),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "state_dict": OrderedDict(state),
    }
    assert same(loaded(save(value)), net)


def test_numpy_scalar_of_numpy_1_loads(net: RepVGG, state: State, save: Save) -> None:
    path = save({"acc": np.float64(1.5), "state_dict": state}, _use_new_zipfile_serialization=False)
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert new in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(new, old))
    assert same(loaded(path), net)


NAMES = ["ant", "bee", "cow", "dog", "eel"]


@pytest.mark.parametrize(
    "value",
    [
        {"class_names": NAMES},
        {"classes": tuple(NAMES)},
        {"meta": {"CLASSES": tuple(NAMES)}},
        {"meta": {"dataset_meta": {"classes": NAMES}}},
    ],
)
def test_class_names_are_read(value: dict[str, Any], state: State, save: Save) -> None:
    assert load_checkpoint(save({**value, "state_dict": state})).class_names == tuple(NAMES)


def test_class_names_of_a_safetensors_file_are_read(state: State, save: Save) -> None:
    path = save(state, "a.safetensors", metadata={"class_names": json.dumps(NAMES)})
    assert load_checkpoint(path).class_names == tuple(NAMES)


@pytest.mark.parametrize("text", ["ant, bee", "[1, 2, 3, 4, 5]", "7", "", "[" * 100_000])
def test_strange_class_names_in_the_metadata_are_left_out(text: str, state: State, save: Save) -> None:
    path = save(state, "a.safetensors", metadata={"class_names": text})
    assert load_checkpoint(path).class_names is None


def test_class_names_of_another_number_of_classes_are_left_out(state: State, save: Save) -> None:
    assert load_checkpoint(save({"classes": NAMES[:4], "state_dict": state})).class_names is None


def test_checkpoint_is_the_same_each_time(checkpoint_file: Path) -> None:
    first, second = load_checkpoint(checkpoint_file), load_checkpoint(checkpoint_file)
    assert list(first.tensors) == list(second.tensors)
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)
