"""`quantize` and the net it returns: rounding, reconstruction, learning, mixed precision, the torch forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.quantized_nets import QUICK, SHAPES, draw_images, fused_net, in_batches, kill_channel
from helpers.small_nets import make_net
from torch import Tensor

from repvgg_deploy.benchmark.graphs import quantize_plainly
from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.quantization import Recipe, collect_statistics, quantize
from repvgg_deploy.quantization.augmentation import MOST_AUGMENTATIONS, AugmentedImages
from repvgg_deploy.quantization.layer_inputs import Streams, input_moments, weights_of_energies
from repvgg_deploy.quantization.layer_report import signal_to_noise_db
from repvgg_deploy.quantization.learned_rounding import _relative_error
from repvgg_deploy.quantization.points import BATCH, fused_blocks
from repvgg_deploy.quantization.recipe import LearningOptions, RoundingOptions, ScaleOptions
from repvgg_deploy.quantization.rounding import choose_weight_scales, round_weights, round_with_feedback

POOR = Recipe(
    "poor",
    dead_inputs=None,
    equalize=None,
    scales=ScaleOptions(thresholds=(1.0,)),
    rounding=RoundingOptions(images=4, samples=64, damping=100.0),
)


def test_the_scale_of_each_filter_is_better_than_that_of_its_largest_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 200, generator=generator)
    weight[:, 0] = 8.0
    chosen, plain = choose_weight_scales(weight, 1), weight.abs().amax(1) / 127

    def error(scales: torch.Tensor) -> torch.Tensor:
        return (round_weights(weight, scales, 1) * scales[:, None] - weight).square().sum(1)

    assert (error(chosen) <= error(plain)).all()


def test_feedback_leaves_less_output_error_than_the_nearest_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 60, generator=generator) @ torch.randn(60, 60, generator=generator)
    covariance = inputs.t() @ inputs / len(inputs)
    weight = torch.randn(24, 60, generator=generator)
    scales = choose_weight_scales(weight, 1) * 8
    exact = inputs @ weight.t()
    outputs = [
        inputs @ (integers * scales[:, None]).t()
        for integers in (round_weights(weight, scales, 1), round_with_feedback(weight, scales, covariance, 1))
    ]
    nearest, feedback = (float((out - exact).square().mean()) for out in outputs)
    assert feedback < 0.7 * nearest


def test_feedback_with_independent_inputs_is_the_nearest_integer() -> None:
    weight = torch.randn(8, 30, generator=torch.Generator().manual_seed(1))
    scales = torch.full((8,), 0.05)
    assert torch.equal(round_with_feedback(weight, scales, torch.eye(30), 1), round_weights(weight, scales, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_moments_are_the_weighted_covariances_of_the_inputs_and_of_the_error_they_bring(groups: int) -> None:
    generator = torch.Generator().manual_seed(2)
    exact = torch.rand(BATCH, 4, 5, 5, generator=generator)
    rounded = exact + 0.1 * torch.randn(exact.shape, generator=generator)
    layer = torch.nn.Conv2d(4, 6, 3, padding=1, groups=groups).requires_grad_(False)
    layer.weight.normal_(generator=generator)
    found = input_moments(Streams(exact, rounded), layer, samples=BATCH * 25, seed=0)
    x, y = (torch.nn.functional.unfold(part.double(), 3, padding=1).transpose(1, 2) for part in (exact, rounded))
    assert len(found) == groups
    for moments, weight, a, b in zip(
        found, layer.weight.double().flatten(1).chunk(groups), x.chunk(groups, 2), y.chunk(groups, 2), strict=True
    ):
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        error = (a - b) @ weight.t()
        square = (error - error.mean(0)).square().sum(1)
        counts = torch.minimum(torch.ones(len(square)), square.median() / square)
        assert 0.2 < float((counts < 1).double().mean()) < 0.6
        both = torch.cov(torch.cat([error, b], 1).t(), correction=0, aweights=counts)[:, len(weight) :]
        torch.testing.assert_close(moments.exact_mean.double(), counts @ a / counts.sum(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.rounded_mean.double(), counts @ b / counts.sum(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.covariance.double(), both[len(weight) :], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.drift.double(), both[: len(weight)], rtol=1e-3, atol=1e-5)


def test_a_few_clipped_pixels_do_not_decide_the_refit() -> None:
    generator = torch.Generator().manual_seed(3)
    rounded = torch.rand(BATCH, 4, 10, 10, generator=generator)
    # A gain of 5 % is there to be made up for; one pixel in fifty was clipped, at a twentieth of what it was.
    exact = 1.05 * rounded + 0.02 * torch.randn(rounded.shape, generator=generator)
    clipped = torch.rand(BATCH, 1, 10, 10, generator=generator) < 0.02
    with_clipped = torch.where(clipped, 20.0 * rounded, exact)
    layer = torch.nn.Conv2d(4, 6, 1).requires_grad_(False)
    layer.weight.normal_(generator=generator)

    def gain(exact: Tensor) -> float:
        (moments,) = input_moments(Streams(exact, rounded), layer, samples=BATCH * 100, seed=0)
        weight = layer.weight.flatten(1)
        refitted = weight + torch.linalg.solve(moments.covariance, moments.drift.t()).t()
        return float((refitted * weight).sum() / weight.square().sum())

    assert gain(exact) == pytest.approx(1.05, abs=0.015)
    # Plain least squares would take 1.05 + 0.02 · 19, or so.
    assert gain(with_clipped) == pytest.approx(1.05, abs=0.015)


def test_moments_where_most_pixels_are_exact_count_all_alike() -> None:
    generator = torch.Generator().manual_seed(4)
    # Multiples of 1/64, and two errors that cancel: so the errors' mean is exactly 0, and that of most pixels too.
    exact = torch.randint(64, (BATCH, 4, 6, 6), generator=generator) / 64
    rounded = exact.clone()
    rounded[0, :, 0, 0] += 0.25
    rounded[0, :, 0, 1] -= 0.25
    layer = torch.nn.Conv2d(4, 6, 1).requires_grad_(False)
    layer.weight.copy_(torch.full_like(layer.weight, 0.5))
    (moments,) = input_moments(Streams(exact, rounded), layer, samples=BATCH * 36, seed=0)
    inputs = rounded.permute(0, 2, 3, 1).flatten(0, 2).double()
    torch.testing.assert_close(moments.covariance.double(), torch.cov(inputs.t(), correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_every_layer_becomes_int8_and_the_logits_stay_near(shape: str) -> None:
    net, images = fused_net(shape), draw_images(64)
    quantized = quantize(net, in_batches(images, 16), QUICK)
    assert quantized.float_layers() == ()
    assert all(layer.weight.dtype == torch.int8 for layer in quantized.integers().values())
    test_images = draw_images(64, seed=9)
    assert signal_to_noise_db(net(test_images), quantized(test_images)) > 20.0


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_batches_of_the_images() -> None:
    net, images = fused_net(), draw_images(64)
    first = quantize(net, in_batches(images, 16), QUICK).integers()
    second = quantize(net, [batch.numpy() for batch in in_batches(images, 50)], QUICK).integers()
    for name, layer in first.items():
        assert torch.equal(layer.weight, second[name].weight)
        assert torch.equal(layer.bias, second[name].bias)
        assert layer.input_scale == second[name].input_scale


@pytest.mark.slow
def test_known_statistics_give_the_same_net() -> None:
    net, images = fused_net(), [draw_images(32)]
    with_them = quantize(net, images, QUICK, statistics=collect_statistics(net, images))
    without = quantize(net, images, QUICK)
    x = draw_images(4, seed=5)
    assert torch.equal(with_them(x), without(x))


@pytest.mark.slow
def test_the_given_net_is_not_changed() -> None:
    net = fused_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    quantize(net, [draw_images(32)], QUICK)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.slow
def test_a_dead_channel_with_an_enormous_weight_costs_nothing() -> None:
    net, images, test_images = fused_net(), [draw_images(64)], draw_images(64, seed=9)
    healthy = signal_to_noise_db(net(test_images), quantize(net, images, QUICK)(test_images))
    kill_channel(net, 1, 2, 1500.0)
    exact = net(test_images)
    nets = (quantize(net, images, QUICK), quantize_plainly(net, images[0]))
    ours, naive = (signal_to_noise_db(exact, quantized(test_images)) for quantized in nets)
    assert ours > healthy - 1.0
    assert naive < ours - 3.0


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 3])
def test_a_net_that_is_dead_from_some_block_on_is_quantized_all_the_same(first: int) -> None:
    net = fused_net()
    conv = fused_blocks(net)[first][1].conv
    conv.weight.zero_()
    conv.bias.fill_(-1.0)
    images = draw_images()
    int8 = quantize(net, [images], QUICK)
    torch.testing.assert_close(int8(images), net(images), rtol=0.01, atol=0.01)


def test_where_most_images_drive_nothing_the_others_count_all_alike() -> None:
    energies = torch.tensor([0.0, 0.0, 0.0, 1.0, 100.0], dtype=torch.float64)
    assert weights_of_energies(energies).tolist() == [1.0] * 5


def test_layers_kept_float_are_the_ones_named_and_help() -> None:
    net, images, test_images = fused_net(), [draw_images(64)], draw_images(64, seed=9)
    names = ("stages.0.0", "stages.3.1", "classifier")
    mixed = quantize(net, images, QUICK, keep_float=names)
    assert mixed.float_layers() == names
    everything = quantize(net, images, QUICK, keep_float=quantize(net, images, QUICK).integers())
    assert signal_to_noise_db(net(test_images), everything(test_images)) > 100.0
    assert mixed.summary is not None
    assert [row.name for row in mixed.summary.layers if row.kept_float] == list(names)


def test_a_layer_of_another_name_is_refused() -> None:
    with pytest.raises(DeployError, match=r"stages\.9\.9"):
        quantize(fused_net(), [draw_images(32)], QUICK, keep_float=["stages.9.9"])


@pytest.mark.slow
@pytest.mark.parametrize("difference", [0.0, 1e-3])
def test_images_that_hardly_differ_leave_no_covariance_but_a_net_all_the_same(difference: float) -> None:
    net = fuse(make_net(), torch.float32)
    generator = torch.Generator().manual_seed(0)
    one, noise = torch.randn(1, 3, 32, 32, generator=generator), torch.randn(12, 3, 32, 32, generator=generator)
    images = one + difference * noise
    with pytest.warns(UserWarning, match="12 calibration images"):
        quantized = quantize(net, [images], Recipe("plain"))
    with torch.no_grad():
        expected = net(images)
        assert float((quantized.as_tensorrt()(images) - expected).norm() / expected.norm()) < 0.1


@pytest.mark.slow
def test_few_images_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="8 calibration images"):
        quantize(fused_net(), [draw_images(8)], QUICK)


def test_images_that_are_not_finite_are_refused() -> None:
    images = draw_images(32)
    images[3, 0, 0, 0] = torch.inf
    with pytest.raises(DeployError, match="not finite"):
        quantize(fused_net(), [images], QUICK)


@pytest.mark.exhaustive
def test_activations_whose_squares_are_not_finite_are_refused() -> None:
    net = fused_net()
    fused_blocks(net)[0][1].conv.weight.mul_(1e25)
    with pytest.raises(DeployError, match="their squares are not finite"):
        quantize(net, [draw_images()], QUICK)


def test_an_image_with_many_times_the_usual_error_does_not_decide_the_loss_of_learning() -> None:
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(32, 10, generator=generator)
    values = (target + 0.1 * torch.randn(32, 10, generator=generator)).requires_grad_()
    with torch.no_grad():
        values[0] = 0.0
    with torch.enable_grad():
        loss = _relative_error(values, target)
        (gradient,) = torch.autograd.grad(loss, values)
    energy = target.square().sum(1)
    errors = ((values - target).square().sum(1) / torch.maximum(energy, energy.median())).detach()
    assert errors[0] > 20 * errors.median()
    counts = (errors.median() / errors).clamp(max=1.0)
    assert float(loss.detach()) == pytest.approx(float((errors * counts).sum() / counts.sum()), rel=1e-5)
    # In a plain mean the first image would pull ten times as hard.
    steepness = gradient.square().sum(1).sqrt()
    assert steepness[0] < steepness[1:].median()


@pytest.mark.slow
def test_learning_lowers_the_error_and_is_repeatable() -> None:
    net, images = fused_net(), [draw_images(128)]
    recipe = replace(POOR, learning=LearningOptions(steps=60, batch=16, rate=0.05))
    learned, again = (quantize(net, images, recipe) for _ in range(2))
    exact, before = net(images[0]), quantize(net, images, POOR)
    # TensorRT and ONNX Runtime saturate at different integers, and learning is to serve both.
    for was, now in ((before, learned), (before.as_tensorrt(), learned.as_tensorrt())):
        assert signal_to_noise_db(exact, now(images[0])) > signal_to_noise_db(exact, was(images[0])) + 0.5
    assert torch.equal(learned(images[0]), again(images[0]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_may_learn_rounding(mode: Callable[[], AbstractContextManager[None]]) -> None:
    net, images = fused_net(), draw_images(32)
    recipe = replace(POOR, learning=LearningOptions(steps=2, batch=4))
    expected = quantize(net, [images], recipe)(images)
    with mode():
        # Made in here, as a caller's own images would be.
        assert torch.equal(quantize(net, [images * 1.0], recipe)(images), expected)
        assert not torch.is_grad_enabled()


def test_statistics_of_other_views_are_refused() -> None:
    net, images = fused_net(), [draw_images(32)]
    with pytest.raises(DeployError, match="1 augmentations of each image, and the recipe quick takes 2"):
        quantize(net, images, replace(QUICK, augmentations=2), collect_statistics(net, images))


@pytest.mark.slow
def test_augmentations_are_more_images_but_not_more_files() -> None:
    net, images = fused_net(), draw_images(48)
    plain, augmented = (
        quantize(net, [images], replace(QUICK, augmentations=augmentations)) for augmentations in (1, 2)
    )
    assert augmented.summary is not None
    assert augmented.summary.images == 48
    assert not torch.equal(plain(images), augmented(images))
    # As if the mirrored images had been given.
    both = quantize(net, [images, images.flip(3)], QUICK)
    assert torch.equal(both(images), augmented(images))


def test_a_view_is_the_image_moved() -> None:
    image = torch.arange(64.0 * 64).reshape(1, 1, 64, 64)
    first, mirrored, *shifted = (batch for batch in AugmentedImages([image], MOST_AUGMENTATIONS))
    assert torch.equal(first, image)
    assert torch.equal(mirrored, image.flip(3))
    assert torch.equal(shifted[1][:, :, :-3, 2:], mirrored[:, :, 3:, :-2])
    # What comes in is the border mirrored; an image of one pixel stays as it is.
    assert torch.equal(shifted[1][:, :, :-3, 1], mirrored[:, :, 3:, 1])
    assert {batch.shape for batch in AugmentedImages([image[:, :, :1, :1]], MOST_AUGMENTATIONS)} == {(1, 1, 1, 1)}


@pytest.mark.slow
def test_the_report_has_a_row_for_each_layer_and_the_pool() -> None:
    quantized = quantize(fused_net(), [draw_images(32)], QUICK)
    assert quantized.summary is not None
    rows = quantized.summary.layers
    assert [row.name for row in rows] == [*list(quantized.integers())[:-1], "pool", "classifier"]
    assert all(np.isfinite(row.output_db) and row.saturation is not None and row.saturation < 0.1 for row in rows)
