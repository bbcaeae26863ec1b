"""Several nets in one file: one is the usual copy of the other, or the user says which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_nets import make_net, name_in_layout
from torch import Tensor

from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.errors import CheckpointError

Save = Callable[..., Path]
State = dict[str, Tensor]


def other_state(seed: int = 9, **spec: Any) -> State:
    return name_in_layout(make_net(seed, **spec), "official")


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def holds(path: Path, state: State, **options: Any) -> bool:
    weight = load_checkpoint(path, **options).tensors["stages.0.0.branch_3x3.conv.weight"]
    return torch.equal(weight, state["stage0.rbr_dense.conv.weight"])


ARRANGEMENTS: dict[str, tuple[Callable[[State, State], Any], str, str]] = {
    "two dicts": (lambda a, b: {"student": a, "teacher": b}, "student", "teacher"),
    "two prefixes": (
        lambda a, b: {"state_dict": prefixed("student.", a) | prefixed("teacher.", b)},
        "state_dict.student",
        "state_dict.teacher",
    ),
    "one inside the other's prefix": (
        lambda a, b: {"state_dict": prefixed("net.", a) | prefixed("net.teacher.", b)},
        "state_dict.net",
        "state_dict.net.teacher",
    ),
    "folds": (lambda a, b: {"fold0": {"model": a}, "fold1": {"model": b}}, "fold0.model", "fold1.model"),
    "list": (lambda a, b: {"models": [a, b]}, "models.0", "models.1"),
    "best": (lambda a, b: {"model": a, "best_model": b}, "model", "best_model"),
}


@pytest.mark.slow
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("larger", [False, True])
def test_several_nets_are_an_error_that_lists_them_and_an_option_chooses(
    arrangement: str, larger: bool, state: State, save: Save
) -> None:
    arrange, first, second = ARRANGEMENTS[arrangement]
    other = other_state(widths=(8, 16, 16, 24, 32)) if larger else other_state()
    path = save(arrange(state, other))
    with pytest.raises(CheckpointError, match="contains 2 nets") as caught:
        load_checkpoint(path)
    assert f"{first} (custom RepVGG" in caught.value.message
    assert f"{second} (custom RepVGG" in caught.value.message
    assert caught.value.hint == f"choose one, as in --net {first}"
    assert holds(path, state, net=first)
    assert holds(path, other, net=second)
    assert load_checkpoint(path, net=second).prefix == second


def test_last_word_of_the_prefix_is_enough(state: State, save: Save) -> None:
    path = save({"state_dict": prefixed("student.model.", state) | prefixed("teacher.model.", other_state())})
    assert holds(path, state, net="student")


def test_option_that_names_no_net_lists_them(state: State, save: Save) -> None:
    path = save({"student": state, "teacher": other_state()})
    with pytest.raises(CheckpointError, match="contains no net under pupil") as caught:
        load_checkpoint(path, net="pupil")
    assert "student" in caught.value.hint


def test_same_tensors_under_two_names_are_one_net(state: State, save: Save) -> None:
    # What Lightning saves of a module that keeps its compiled twin.
    path = save({"state_dict": prefixed("net.", state) | prefixed("compiled._orig_mod.", state)})
    assert holds(path, state)


def test_optimizer_that_keeps_tensors_by_name_is_no_net(state: State, save: Save) -> None:
    trained = {key: torch.zeros_like(t) for key, t in state.items() if key.endswith(("weight", "bias"))}
    assert holds(save({"optimizer": {"exp_avg": trained, "exp_avg_sq": dict(trained)}, "model": state}), state)


def test_averages_stay_apart_from_a_choice_between_nets(state: State, save: Save) -> None:
    average = other_state(seed=5)
    path = save({"student": state, "student_ema": average, "teacher": other_state()})
    assert holds(path, state, net="student")
    assert holds(path, average, ema=True)


def test_another_network_beside_the_net_is_no_second_net(state: State, save: Save) -> None:
    discriminator = {"disc.layer1.0.conv1.weight": torch.ones(8, 8, 3, 3), "disc.fc.weight": torch.ones(1, 8)}
    path = save({"state_dict": prefixed("gen.", state) | discriminator})
    assert holds(path, state)
    assert any("disc.layer1" in note for note in load_checkpoint(path).notes)
