"""The steps of quantization-aware training: what they win back, and that nothing but their number decides them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers.small_nets import make_net
from torch import Tensor

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.images.synthetic import draw_images
from repvgg_deploy.quantization import load_recipe
from repvgg_deploy.quantization.qat import QatOptions, prepare_qat, quantizers
from repvgg_deploy.quantization.qat_scales import observe_scales
from repvgg_deploy.quantization.qat_start import StartingPoint, start_training
from repvgg_deploy.quantization.qat_training import QatTraining, TrainingOptions, set_saturation

SIZE = Preprocessing(64, 64, 64)
PIXELS, LABELS = draw_images(64, 31)
IMAGES = torch.from_numpy(normalize(PIXELS, SIZE))
LIMITS = (IMAGES.amin((0, 2, 3))[:, None, None], IMAGES.amax((0, 2, 3))[:, None, None])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def start() -> StartingPoint:
    net = build(load_checkpoint(data_folder("models") / "demo.safetensors"))
    return start_training(net, [IMAGES], load_recipe("fast"), QatOptions(4, 4, per_tensor=True))


def begin(start: StartingPoint, options: TrainingOptions) -> QatTraining:
    return QatTraining(copy.deepcopy(start.student), start.teacher, options)


def take(indices: Tensor) -> tuple[Tensor, Tensor | None]:
    return IMAGES[indices], torch.from_numpy(LABELS)[indices]


def agreement(training: QatTraining) -> float:
    images = torch.from_numpy(normalize(draw_images(200, 32)[0], SIZE))
    set_saturation(training.student, 255)
    with torch.no_grad():
        same = training.student.eval()(images).argmax(1) == training.teacher.net(images).argmax(1)
    training.student.train()
    return float(same.float().mean())


@pytest.mark.exhaustive
def test_training_wins_back_most_of_what_rounding_lost() -> None:
    net = build(load_checkpoint(data_folder("models") / "demo.safetensors"))
    # Rounded to nearest: rounding with error feedback leaves training little to win back.
    options = QatOptions(4, 4, per_tensor=True)
    student = prepare_qat(net, observe_scales(net, [IMAGES], options), options)
    start = StartingPoint(student, fuse(net, torch.float32).eval())
    training = begin(start, TrainingOptions(steps=40, batch=32, rate=0.05))
    lost = 1 - agreement(training)
    losses = [training.step(take, len(IMAGES), LIMITS)["loss"] for _ in range(40)]
    assert lost > 0.2
    assert 1 - agreement(training) < 0.5 * lost
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(start) -> None:
    options = TrainingOptions(steps=6, batch=16)
    whole = begin(start, options)
    for _ in range(6):
        whole.step(take, len(IMAGES), LIMITS)
    stopped = begin(start, options)
    for _ in range(3):
        stopped.step(take, len(IMAGES), LIMITS)
    state = copy.deepcopy(stopped.state())
    stopped.step(take, len(IMAGES), LIMITS)
    resumed = begin(start, options)
    resumed.restore(state)
    for _ in range(3):
        resumed.step(take, len(IMAGES), LIMITS)
    expected = whole.student.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.student.state_dict().items())


@pytest.mark.slow
def test_means_are_of_all_steps_since_the_last_ones_also_after_a_stop(start) -> None:
    options = TrainingOptions(steps=4, batch=8)
    training = begin(start, options)
    training.step(take, len(IMAGES), LIMITS)
    training.means()
    second = training.step(take, len(IMAGES), LIMITS)
    resumed = begin(start, options)
    resumed.restore(copy.deepcopy(training.state()))
    third = resumed.step(take, len(IMAGES), LIMITS)
    assert resumed.means() == {name: pytest.approx((second[name] + third[name]) / 2) for name in ("loss", "agreement")}


@pytest.mark.slow
def test_the_seed_decides_the_pictures(start) -> None:
    losses = [
        begin(start, TrainingOptions(steps=2, batch=8, seed=seed)).step(take, len(IMAGES), LIMITS)["loss"]
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
@pytest.mark.parametrize(("full_range", "seen"), [(False, [127, 255, 127]), (True, [255, 255, 255])])
def test_steps_take_turns_between_the_engines_they_are_for(full_range, seen) -> None:
    net = make_net()
    options = QatOptions(full_range=full_range)
    student = prepare_qat(net, observe_scales(net, [IMAGES], options), options)
    training = QatTraining(student, fuse(net, torch.float32).eval(), TrainingOptions(steps=3, batch=4))
    taken = []
    for _ in range(3):
        training.step(take, len(IMAGES), LIMITS)
        taken.append(max(quantizer.highest for quantizer in quantizers(student)))
    assert taken == seen


@pytest.mark.slow
def test_labels_add_their_part_to_the_loss(start) -> None:
    plain, labelled = (
        begin(start, TrainingOptions(steps=2, batch=8, labels=weight)).step(take, len(IMAGES), LIMITS)["loss"]
        for weight in (0.0, 1.0)
    )
    assert labelled > plain + 0.1


@pytest.mark.slow
def test_mixed_precision_trains_float32_parameters(start) -> None:
    training = begin(start, TrainingOptions(steps=4, batch=8, mixed_precision=True))
    values = training.step(take, len(IMAGES), LIMITS)
    exact = begin(start, TrainingOptions(steps=4, batch=8)).step(take, len(IMAGES), LIMITS)
    assert all(p.dtype == torch.float32 for p in training.student.parameters())
    assert values["loss"] == pytest.approx(exact["loss"], rel=0.1)
