"""A checkpoint's own configuration decides what its tensors do not tell, and is never executed."""

import argparse
import functools
import json
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.small_nets import make_spec, name_in_layout, randomize
from torch import nn

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.checkpoints.python_config import read_python_config
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.nets.activations import parse_activation
from repvgg_deploy.nets.preprocessing import choose_preprocessing
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.settings import NO_SETTINGS, StructureOptions

CIFAR = (1, 1, 2, 2, 2)


def make(strides: tuple[int, ...] = CIFAR, activation: str = "relu", **spec: Any) -> RepVGG:
    # A first block that keeps its channels, without an identity branch, would tell its stride.
    shape = make_spec(widths=(6, 8, 12, 16, 24), **spec)
    net = RepVGG(replace(shape.with_strides(strides), activation=parse_activation(activation)))
    randomize(net)
    return net.requires_grad_(False).eval()


def preprocessing_of(path: Any) -> Any:
    checkpoint = load_checkpoint(path)
    return choose_preprocessing(checkpoint.spec, PreprocessingOptions(), checkpoint.settings)


MMENGINE = """
default_scope = 'mmpretrain'
_secret = open('/etc/passwd').read()
strides = (1, 2, 2, 2)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='RepVGG', arch='A0', strides=strides, act_cfg=dict(type='LeakyReLU', negative_slope=0.1),
                  norm_cfg=dict(type='BN', eps=0.001)),
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[51.0, 51.0, 51.0], to_rgb=False))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=72, edge='short', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=64),
    dict(type='PackInputs'),
]
"""


def test_mmengines_configuration_is_read_as_text(save) -> None:
    net = make((2, 1, 2, 2, 2), "leaky_relu:0.1")
    path = save({"state_dict": name_in_layout(net, "openmmlab"), "meta": {"cfg": MMENGINE}})
    checkpoint = load_checkpoint(path)
    assert checkpoint.spec.strides == (2, 1, 2, 2, 2)
    assert str(checkpoint.spec.activation) == "leaky_relu:0.1"
    assert checkpoint.spec.bn_eps == 0.001
    assert checkpoint.origins["strides"] == "the checkpoint's configuration"
    chosen = preprocessing_of(path)
    assert (chosen.height, chosen.resize, chosen.interpolation, chosen.color_order) == (64, 72, "bicubic", "bgr")
    assert chosen.mean == (0.5, 0.5, 0.5)
    assert chosen.std == (0.2, 0.2, 0.2)


@pytest.mark.parametrize("extra", ["dilations=(1, 1, 2, 4)", "add_ppf=True"])
def test_what_mmpretrain_can_build_and_this_cannot_is_refused(save, extra) -> None:
    text = f"model = dict(backbone=dict(type='RepVGG', {extra}))"
    with pytest.raises(CheckpointError, match="the net's configuration sets"):
        load_checkpoint(save({"state_dict": name_in_layout(make(), "openmmlab"), "meta": {"cfg": text}}))


def test_options_go_before_the_configuration(save) -> None:
    path = save({"state_dict": name_in_layout(make(), "openmmlab"), "meta": {"cfg": MMENGINE}})
    checkpoint = load_checkpoint(path, structure=StructureOptions(strides=CIFAR, activation="silu"))
    assert (checkpoint.spec.strides, str(checkpoint.spec.activation)) == (CIFAR, "silu")
    assert checkpoint.spec.bn_eps == 0.001
    assert checkpoint.origins == {
        "strides": "option", "activation": "option", "bn_eps": "the checkpoint's configuration",
    }  # fmt: skip


@pytest.mark.parametrize(
    "hyper_parameters",
    [
        {"strides": [1, 1, 2, 2, 2], "act": "silu", "image_size": 32},
        {"model": {"stage_strides": (1, 1, 2, 2, 2), "activation": "SiLU"}, "data": {"img_size": [32, 32]}},
        argparse.Namespace(strides=[1, 1, 2, 2, 2], act_layer=nn.SiLU, input_size=(3, 32, 32)),
        {"cfg": argparse.Namespace(strides=[1, 1, 2, 2, 2]), "act_layer": nn.SiLU(), "resolution": 32},
    ],
)
def test_hyperparameters_are_found_under_the_names_that_people_give_them(save, hyper_parameters) -> None:
    net = make(activation="silu")
    state = {f"net.{key}": value for key, value in name_in_layout(net, "official").items()}
    path = save({"state_dict": state, "hyper_parameters": hyper_parameters, "pytorch-lightning_version": "2.5"})
    checkpoint = load_checkpoint(path)
    assert (checkpoint.spec.strides, str(checkpoint.spec.activation)) == (CIFAR, "silu")
    assert preprocessing_of(path).height == 32
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(build(checkpoint)(images), net(images))


def test_the_slope_of_a_partial_is_read(save) -> None:
    config = {"act_layer": functools.partial(nn.LeakyReLU, negative_slope=0.2)}
    path = save({"state_dict": name_in_layout(make(), "official"), "config": config})
    assert str(load_checkpoint(path).spec.activation) == "leaky_relu:0.2"


@pytest.mark.parametrize(
    ("data", "crop", "expected"),
    [
        ({"IMG_SIZE": 224, "TEST_SIZE": 320, "INTERPOLATION": "bicubic"}, True, (320, 365, "bicubic")),
        ({"IMG_SIZE": 64, "TEST_SIZE": 64, "INTERPOLATION": "bilinear"}, False, (64, 64, "bilinear")),
        ({"IMG_SIZE": 32, "TEST_SIZE": 32, "DATASET": "cf100"}, True, (32, 32, "bilinear")),
    ],
)
def test_the_official_trainers_configuration_gives_its_test_transform(save, data, crop, expected) -> None:
    path = save(
        {"model": name_in_layout(make(), "official"), "config": {"DATA": data, "TEST": {"CROP": crop}, "MODEL": {}}}
    )
    chosen = preprocessing_of(path)
    assert (chosen.height, chosen.resize, chosen.interpolation) == expected
    assert (chosen.mean[0] == pytest.approx(0.5070752)) is (data.get("DATASET") == "cf100")


def timm_folder(save: Any, config: Any, net: RepVGG | None = None, name: str = "model.safetensors") -> Any:
    path = save(name_in_layout(net or make((2,) * 5), "timm"), name)
    (path.parent / "config.json").write_text(json.dumps(config))
    return path


TIMM = {
    "architecture": "repvgg_a0",
    "num_classes": 5,
    "label_names": [f"kind {n}" for n in range(5)],
    "pretrained_cfg": {
        "input_size": [3, 96, 96], "test_input_size": [3, 128, 128], "crop_pct": 0.875, "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25], "interpolation": "bicubic",
    },
}  # fmt: skip


def test_config_json_beside_the_weights_is_read(save) -> None:
    path = timm_folder(save, TIMM)
    chosen = preprocessing_of(path)
    assert (chosen.height, chosen.width, chosen.resize, chosen.interpolation) == (96, 96, 109, "bicubic")
    assert (chosen.mean, chosen.std) == ((0.5,) * 3, (0.25,) * 3)
    assert load_checkpoint(path).class_names == tuple(f"kind {n}" for n in range(5))


@pytest.mark.slow
def test_transformers_preprocessor_is_read(save) -> None:
    path = timm_folder(save, {"architectures": ["RepVGGForImageClassification"], "id2label": {"0": "a", "1": "b"}})
    (path.parent / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": {"height": 80, "width": 80}, "size": {"shortest_edge": 90}, "resample": 3,
                    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    )  # fmt: skip
    chosen = preprocessing_of(path)
    assert (chosen.height, chosen.interpolation, chosen.mean[0]) == (80, "bicubic", 0.5)
    assert load_checkpoint(path).class_names is None


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "image_size": 384},
        {**TIMM, "architecture": "resnet50"},
        [1, 2],
        {"pretrained_cfg": {"input_size": "large", "mean": [None], "std": 3, "crop_pct": -1, "interpolation": "magic"}},
        {"mean": 0.31, "std": 0.02},
        {"mean": [0.1], "std": [0.2]},
        {"strides": [4, 8, 16], "stride": 32, "activation": "softmax"},
        {"crop_pct": 10**400, "input_size": [3, 10**400, 32], "mean": [10**400], "std": [10**400]},
        {"activation": {"type": "LeakyReLU", "negative_slope": 10**400}},
        {"label_names": ["\ud800", "a", "b", "c", "d"]},
    ],
)
def test_what_is_of_another_net_or_makes_no_sense_is_not_used(save, config) -> None:
    chosen = preprocessing_of(timm_folder(save, config))
    assert (chosen.height, chosen.resize, chosen.mean[0], chosen.interpolation) == (224, 256, 0.485, "bilinear")
    assert load_checkpoint(timm_folder(save, config)).spec.strides == (2,) * 5


def test_damaged_json_is_as_none(save) -> None:
    path = timm_folder(save, {})
    for text in ("{", "[" * 100_000, "\udcff"):
        (path.parent / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert preprocessing_of(path).height == 224


@pytest.mark.parametrize("value", [0.5, 10**30, True, {"a": 1}, [1.5, None]])
@pytest.mark.parametrize("key", ["architecture", "architectures", "model_type"])
def test_names_of_architectures_that_are_no_text_say_nothing(key, value, save) -> None:
    assert load_checkpoint(timm_folder(save, {key: value})).settings == NO_SETTINGS


def test_settings_that_contradict_the_tensors_are_told_and_not_used(save) -> None:
    state = name_in_layout(make((2,) * 5, classes=5), "official")
    path = save({"state_dict": state, "hyper_parameters": {"strides": [1, 2, 2], "activation": "snake"}})
    checkpoint = load_checkpoint(path)
    assert checkpoint.spec.strides == (2,) * 5
    assert any("3 strides for 5 stages" in note for note in checkpoint.notes)
    assert any("'snake'" in note for note in checkpoint.notes)


class _ConvBN(nn.Sequential):
    def __init__(self, i: int, o: int, k: int, s: int) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(i, o, k, s, k // 2, bias=False))
        self.add_module("bn", nn.BatchNorm2d(o, eps=1e-3))


class _Block(nn.Module):
    def __init__(self, i: int, o: int, s: int) -> None:
        super().__init__()
        self.nonlinearity = nn.Hardswish()
        self.rbr_dense, self.rbr_1x1 = _ConvBN(i, o, 3, s), _ConvBN(i, o, 1, s)
        self.rbr_identity = nn.BatchNorm2d(i, eps=1e-3) if i == o and s == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.rbr_dense(x) + self.rbr_1x1(x)
        return self.nonlinearity(total if self.rbr_identity is None else total + self.rbr_identity(x))


class _Net(nn.Module):
    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.stage0 = _Block(3, 6, strides[0])
        self.stage1 = nn.Sequential(_Block(6, 8, strides[1]), _Block(8, 8, 1))
        self.stage2 = nn.Sequential(_Block(8, 12, strides[2]))
        self.linear = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage2(self.stage1(self.stage0(x)))
        return self.linear(x.mean((2, 3)))


def test_pickled_modules_tell_all_of_it(save, monkeypatch) -> None:
    """The classes are gone when the file is read."""
    foreign = ModuleType("their_training_code")
    monkeypatch.setitem(sys.modules, "their_training_code", foreign)
    for kind in (_ConvBN, _Block, _Net):
        monkeypatch.setattr(kind, "__module__", "their_training_code")
        setattr(foreign, kind.__name__, kind)
    net = _Net((1, 2, 1)).eval().requires_grad_(False)
    randomize(net)
    path = save(net)
    monkeypatch.delitem(sys.modules, "their_training_code")
    checkpoint = load_checkpoint(path)
    assert (checkpoint.spec.strides, str(checkpoint.spec.activation)) == ((1, 2, 1), "hardswish")
    assert checkpoint.spec.bn_eps == pytest.approx(1e-3)
    assert checkpoint.origins["strides"] == "the pickled modules"
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(build(checkpoint)(images), net(images), atol=1e-5)


def test_python_text_is_read_as_far_as_it_is_literal() -> None:
    text = (
        "a = 1\nb = dict(c=a, d=[-2, 3.5], e=f(x))\nimport os\ng = os.getcwd()\nh = {'i': (1, 2), 3: 4}\n*j, k = 1, 2"
    )
    assert read_python_config(text) == {"a": 1, "b": {"c": 1, "d": [-2, 3.5]}, "h": {"i": [1, 2]}}
    assert read_python_config("a = " + "[" * 500 + "]" * 500) == {}
    assert read_python_config("a = (") == {}
    assert read_python_config("a = 1\x00") == {}
    assert read_python_config("a = 1\n" * (1 << 18)) == {}
