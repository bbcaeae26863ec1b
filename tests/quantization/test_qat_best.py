"""The best state along a run: which one it is, and that the student gets it back."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.quantized_nets import QUICK
from helpers.small_nets import make_net
from torch import Tensor

from repvgg_deploy.quantization.qat import QatOptions
from repvgg_deploy.quantization.qat_best import BestState
from repvgg_deploy.quantization.qat_start import start_training
from repvgg_deploy.quantization.qat_training import QatTraining, TrainingOptions, set_saturation


def images_of(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def training() -> QatTraining:
    start = start_training(make_net().requires_grad_(False), [images_of(40, 1)], QUICK, QatOptions())
    return QatTraining(start.student, start.teacher, TrainingOptions(steps=4, batch=8))


def damage(training: QatTraining, size: float) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(training.student.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter += size * parameter.abs().mean() * noise


def values_of(training: QatTraining) -> dict[str, Tensor]:
    return copy.deepcopy(training.student.state_dict())


def test_a_run_that_gets_worse_ends_where_it_was_best(training) -> None:
    begun = values_of(training)
    best = BestState(images_of(24, 3))
    first = best.offer(training)
    damage(training, 0.3)
    training.done = 2
    second = best.offer(training)
    assert second["held_out_divergence"] > first["held_out_divergence"] >= 0
    assert second["held_out_agreement"] <= first["held_out_agreement"] <= 100
    assert best.step == 0
    best.put_into(training)
    assert all(torch.equal(value, begun[name]) for name, value in training.student.state_dict().items())
    training.done = 0


def test_a_better_state_takes_the_place_of_a_worse_one(training) -> None:
    begun = values_of(training)
    best = BestState(images_of(24, 3))
    damage(training, 0.3)
    best.offer(training)
    training.student.load_state_dict(begun)
    training.done = 3
    best.offer(training)
    damage(training, float("nan"))
    training.done = 4
    best.offer(training)
    assert best.step == 3
    again = BestState(images_of(24, 3))
    again.restore(copy.deepcopy(best.state()))
    again.put_into(training)
    assert again.step == 3
    assert all(torch.equal(value, begun[name]) for name, value in training.student.state_dict().items())
    training.done = 0


def test_labels_count_for_the_best_state_as_much_as_in_the_training(training) -> None:
    images = images_of(24, 3)
    unlikely = training.teacher.net(images).argmin(1)
    steps = []
    for labels, weight in ((None, 100.0), (unlikely, 0.0), (unlikely, 100.0)):
        learning = QatTraining(copy.deepcopy(training.student), training.teacher.net, TrainingOptions(4, labels=weight))
        best = BestState(images, labels)
        rows = [best.offer(learning)]
        # Further from the float net, which finds these classes the least likely of all, and nearer to the labels.
        with torch.no_grad():
            learning.student.classifier.linear.weight.mul_(0.5)
            learning.student.classifier.log_weight_scale.sub_(0.6931)
            learning.student.classifier.linear.bias.mul_(0.5)
        learning.done = 2
        rows.append(best.offer(learning))
        assert rows[1]["held_out_divergence"] > rows[0]["held_out_divergence"]
        steps.append(best.step)
    assert steps == [0, 0, 2]


@pytest.mark.slow
def test_with_the_full_range_only_the_engines_that_have_it_count() -> None:
    net, images = make_net().requires_grad_(False), images_of(24, 3)
    for full_range, engines in ((False, (127, 255)), (True, (255,))):
        start = start_training(net, [images_of(40, 1)], QUICK, QatOptions(full_range=full_range))
        training = QatTraining(start.student, start.teacher, TrainingOptions(steps=1))
        given = BestState(images).offer(training)["held_out_divergence"]
        parts = []
        for highest in engines:
            set_saturation(training.student, highest)
            answers = training.student.eval()(images).double().log_softmax(1)
            wanted = training.teacher.net(images).double().log_softmax(1)
            parts.append(float((wanted.exp() * (wanted - answers)).sum(1).mean().detach()))
        assert given == pytest.approx(sum(parts) / len(parts), rel=1e-6)


def test_the_float_net_itself_agrees_with_itself(training) -> None:
    same = QatTraining(copy.deepcopy(training.teacher.net), training.teacher.net, TrainingOptions(steps=1))
    given = BestState(images_of(24, 3)).offer(same)
    assert given == {"held_out_agreement": 100.0, "held_out_divergence": pytest.approx(0.0, abs=1e-9)}
