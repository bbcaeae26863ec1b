"""Heads: a linear layer under any name, what folds into one, none at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.library_nets import Official
from helpers.small_nets import make_net, name_in_layout
from torch import Tensor, nn

from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.nets.settings import StructureOptions

Save = Callable[..., Path]
State = dict[str, Tensor]
FEATURES, CLASSES = 24, 5


def with_head(state: State, head: nn.Module, prefix: str) -> State:
    """The blocks of a net with another head, under the names that the head has as an attribute `prefix`."""
    blocks = {key: tensor for key, tensor in state.items() if not key.startswith("linear.")}
    generator = torch.Generator().manual_seed(3)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_(0, 0.3, generator=generator)
    return blocks | {f"{prefix}{key}": tensor for key, tensor in head.state_dict().items()}


def logits_agree(path: Path, head: nn.Module, images: Tensor, **options: Any) -> bool:
    net = build(load_checkpoint(path, **options))
    trunk = make_net()
    trunk.classifier = nn.Identity()
    features = trunk(images)
    expected = head.eval()(features[..., None, None] if isinstance(head, nn.Conv2d) else features).flatten(1)
    return bool((net(images) - expected).norm() < 1e-5 * expected.norm())


@pytest.mark.parametrize(
    "name", ["classifier", "fc", "head", "linear.1", "head.fc", "cls_head.0", "my_output", "net.last"]
)
def test_linear_layer_under_any_name_is_the_classifier(name: str, state: State, save: Save, images: Tensor) -> None:
    head = nn.Linear(FEATURES, CLASSES)
    path = save(with_head(state, head, f"{name}."))
    assert logits_agree(path, head, images)
    assert f"the classifier is {name}" in load_checkpoint(path).notes


@pytest.mark.parametrize("arrange", ["beside", "outside", "in front"])
def test_head_beside_a_prefixed_backbone_is_found(arrange: str, state: State, save: Save, images: Tensor) -> None:
    head = nn.Linear(FEATURES, CLASSES)
    blocks = {f"model.backbone.{k}": t for k, t in state.items() if not k.startswith("linear.")}
    name = {"beside": "model.fc", "outside": "fc", "in front": "0.fc"}[arrange]
    tensors = {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    value = tensors | blocks if arrange == "in front" else blocks | tensors
    assert logits_agree(save({"state_dict": value}), head, images)


def test_head_in_a_dict_of_its_own_is_found(state: State, save: Save, images: Tensor) -> None:
    head = nn.Linear(FEATURES, CLASSES)
    blocks = {k: t for k, t in state.items() if not k.startswith("linear.")}
    apart = {f"fc.{key}": tensor for key, tensor in head.state_dict().items()}
    assert logits_agree(save({"net": {"backbone": blocks, "head": apart}, "optimizer": {"fc": apart}}), head, images)
    assert logits_agree(save({"backbone": blocks, "classifier": head.state_dict()}), head, images)


FOLDED = {
    "dropout": nn.Sequential(nn.Dropout(), nn.Linear(FEATURES, CLASSES)),
    "bn in front": nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES)),
    "bn behind": nn.Sequential(nn.Linear(FEATURES, CLASSES, bias=False), nn.BatchNorm1d(CLASSES)),
    "bn without weights": nn.Sequential(nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, CLASSES)),
    "two linear layers": nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)),
    "linear, bn, linear": nn.Sequential(nn.Linear(FEATURES, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)),
    "same width throughout": nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_what_is_linear_folds_into_one_layer(kind: str, state: State, save: Save, images: Tensor) -> None:
    assert logits_agree(save(with_head(state, FOLDED[kind], "classifier.")), FOLDED[kind], images)


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), *between, nn.Linear(8, CLASSES))


UNTOLD = {
    "relu": (mlp(nn.ReLU()), "relu"),
    "dropout": (mlp(nn.Dropout()), "none"),
    "bn and relu": (mlp(nn.BatchNorm1d(8), nn.ReLU()), "relu"),
    "relu and dropout": (mlp(nn.ReLU(), nn.Dropout()), "relu"),
    "relu and bn": (mlp(nn.ReLU(), nn.BatchNorm1d(8)), "relu"),
    "two relus": (
        nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
        "relu",
    ),
}


@pytest.mark.parametrize("kind", UNTOLD)
def test_activation_that_names_do_not_tell_is_asked_for(kind: str, state: State, save: Save, images: Tensor) -> None:
    head, activation = UNTOLD[kind]
    path = save(with_head(state, head, "classifier."))
    with pytest.raises(CheckpointError, match="names do not tell the activation between them") as caught:
        load_checkpoint(path)
    assert "--head-act" in caught.value.hint
    assert logits_agree(path, head, images, structure=StructureOptions(head_activation=activation))


def test_layers_with_names_of_their_own_are_asked_for(state: State, save: Save, images: Tensor) -> None:
    head = mlp(nn.ReLU())
    named = {key.replace("0.", "fc1.").replace("2.", "fc2."): tensor for key, tensor in head.state_dict().items()}
    path = save({key: t for key, t in state.items() if not key.startswith("linear.")} | named)
    with pytest.raises(CheckpointError, match="fc1 and fc2 are two layers of the classifier"):
        load_checkpoint(path)
    assert logits_agree(path, head, images, structure=StructureOptions(head_activation="relu"))


@pytest.mark.parametrize("kind", [*UNTOLD, *FOLDED])
def test_pickled_modules_tell_what_is_between_the_layers(kind: str, save: Save, images: Tensor) -> None:
    head = UNTOLD[kind][0] if kind in UNTOLD else FOLDED[kind]
    net = Official()
    net.linear = head
    path = save(net)
    expected = net.eval()(images)
    assert (build(load_checkpoint(path))(images) - expected).norm() < 1e-5 * expected.norm()


def test_another_activation_of_the_head_is_an_error(save: Save) -> None:
    net = Official()
    net.linear = mlp(nn.GELU())
    with pytest.raises(CheckpointError, match="the head has the activation gelu"):
        load_checkpoint(save(net))


def test_layer_without_a_bias_is_a_classifier(state: State, save: Save, images: Tensor) -> None:
    head = nn.Linear(FEATURES, CLASSES, bias=False)
    assert logits_agree(save(with_head(state, head, "fc.")), head, images)


def test_one_by_one_convolution_is_a_classifier(state: State, save: Save, images: Tensor) -> None:
    head = nn.Conv2d(FEATURES, CLASSES, 1)
    assert logits_agree(save(with_head(state, head, "classifier.1.")), head, images)


def test_no_head_gives_features(state: State, save: Save, images: Tensor) -> None:
    path = save({key: tensor for key, tensor in state.items() if not key.startswith("linear.")})
    checkpoint = load_checkpoint(path)
    assert checkpoint.spec.classes == 0
    assert "the net has no classifier: its output is the pooled features" in checkpoint.notes
    assert build(checkpoint)(images).shape == (4, FEATURES)


def test_backbone_of_a_detector_has_no_head(state: State, save: Save) -> None:
    neck = {
        "neck.lateral_convs.0.conv.weight": torch.ones(16, FEATURES, 1, 1),
        "neck.fpn_convs.0.conv.weight": torch.ones(16, 16, 3, 3),
        "bbox_head.fc_cls.weight": torch.ones(81, 1024),
        "bbox_head.fc_cls.bias": torch.ones(81),
    }
    backbone = {f"backbone.{k}": t for k, t in state.items() if not k.startswith("linear.")}
    checkpoint = load_checkpoint(save({"state_dict": backbone | neck}))
    assert checkpoint.spec.classes == 0
    assert any("4 tensors outside the net were left out" in note for note in checkpoint.notes)


def test_two_layers_that_could_be_the_classifier_are_named(state: State, save: Save) -> None:
    tensors = {f"{name}.{leaf}": torch.ones(shape) for name in ("head_age", "head_sex") for leaf, shape in _SHAPES}
    with pytest.raises(CheckpointError, match="2 layers could be the classifier: head_age, head_sex"):
        load_checkpoint(save(with_head(state, nn.Identity(), "") | tensors))


_SHAPES = (("weight", (CLASSES, FEATURES)), ("bias", (CLASSES,)))


def test_whole_net_of_a_library_with_another_head(images: Tensor, save: Save) -> None:
    state = name_in_layout(make_net(), "timm")
    head = nn.Linear(FEATURES, 3)
    blocks = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    assert logits_agree(save(blocks | {f"fc.{key}": tensor for key, tensor in head.state_dict().items()}), head, images)
