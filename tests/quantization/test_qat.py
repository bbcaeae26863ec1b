"""Quantization-aware training: what a prepared block computes, where training starts, and what it gives back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.quantized_nets import QUICK, QUICK_RECIPE, SHAPES
from helpers.small_nets import BARE, Segmenter, make_net
from torch import Tensor, nn

from repvgg_deploy import convert_qat, prepare_qat
from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.fusion.fuse import equivalent_kernel_bias, fuse
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.images.synthetic import draw_images
from repvgg_deploy.nets.repvgg import RepVGG, TrainingBlock
from repvgg_deploy.quantization import load_recipe, quantize
from repvgg_deploy.quantization.grid import Grid
from repvgg_deploy.quantization.pair_sums import INT16_MAX, largest_pair_sum
from repvgg_deploy.quantization.qat import FakeQuantizer, QatBlock, QatOptions, QatScales, quantizers, round_kernel
from repvgg_deploy.quantization.qat_scales import (
    apply_scales,
    observe_scales,
)
from repvgg_deploy.quantization.qat_start import start_training
from repvgg_deploy.quantization.qat_training import set_saturation

KINDS = {**SHAPES, "QARepVGG V2": {"norm_after_sum": True, "branches": BARE}}
DEMO = data_folder("models") / "demo.safetensors"


def images_of(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def drawn(count: int, seed: int) -> Tensor:
    return torch.from_numpy(normalize(draw_images(count, seed)[0], Preprocessing(64, 64, 64)))


def relative(values: Tensor, target: Tensor) -> float:
    return float((values - target).detach().norm() / target.detach().norm())


def one_block() -> tuple[RepVGG, str, QatBlock]:
    """A net, the name of a block of it with all three branches, and that block as it is trained."""
    net = make_net()
    name = next(n for n, b in net.named_blocks() if isinstance(b, TrainingBlock) and "branch_identity" in b._modules)
    prepared = prepare_qat(net, observe_scales(net, [images_of(8)]))
    block = prepared.get_submodule(name)
    assert isinstance(block, QatBlock)
    return net, name, block


def test_a_block_rounds_the_equivalent_kernel_and_not_its_branches() -> None:
    net, name, block = one_block()
    trained = net.get_submodule(name)
    assert isinstance(trained, TrainingBlock)
    x = torch.rand(2, trained.spec.in_channels, 9, 9, generator=torch.Generator().manual_seed(1))
    scale, rounded = block.weight_scale.detach(), block.input(x).detach()
    kernel, bias = equivalent_kernel_bias(trained, torch.float32)
    whole = F.relu(F.conv2d(rounded, round_kernel(kernel, scale), block.round_bias(bias), padding=1))
    # The same scales on each branch by itself: what a net with constrained branches would compute.
    branches = torch.zeros_like(kernel)
    for part, size in (("branch_3x3", 3), ("branch_1x1", 1)):
        branch = trained.get_submodule(part)
        gain = branch.bn.weight / (branch.bn.running_var + branch.bn.eps).sqrt()
        inner = slice(1 - size // 2, 2 + size // 2)
        branches[:, :, inner, inner] += round_kernel(branch.conv.weight * gain[:, None, None, None], scale)
    norm = trained.get_submodule("branch_identity").bn
    identity = torch.zeros_like(kernel)
    out = torch.arange(len(kernel))
    identity[out, out, 1, 1] = norm.weight / (norm.running_var + norm.eps).sqrt()
    apart = F.relu(F.conv2d(rounded, branches + round_kernel(identity, scale), block.round_bias(bias), padding=1))
    given = block(x)
    assert relative(given, whole) < 1e-6
    assert relative(given, apart) > 1e-3


def test_branches_share_the_gradient_of_their_one_kernel() -> None:
    net, name, block = one_block()
    x = torch.rand(2, net.get_submodule(name).spec.in_channels, 9, 9, generator=torch.Generator().manual_seed(1))
    target = torch.rand(block(x).shape, generator=torch.Generator().manual_seed(2))
    (block(x) - target).square().sum().backward()
    gains, gradients = [], []
    for part, center in (("branch_3x3", 1), ("branch_1x1", 0)):
        branch = block.block.get_submodule(part)
        gains.append(branch.bn.weight.detach() / (branch.bn.running_var + branch.bn.eps).sqrt())
        gradients.append(branch.conv.weight.grad[:, :, center, center])
    torch.testing.assert_close(gradients[0] / gains[0][:, None], gradients[1] / gains[1][:, None], rtol=1e-4, atol=1e-6)
    identity = block.block.get_submodule("branch_identity").bn
    assert float(identity.weight.grad.abs().sum()) > 0
    assert float(block.log_weight_scale.grad.abs().sum()) > 0
    assert float(block.input.log_scale.grad.abs()) > 0


@pytest.mark.parametrize("bits", [8, 6])
def test_the_scale_gets_the_gradient_of_the_rounding_error(bits) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, 3, 3, generator=generator, requires_grad=True)
    scale = torch.full((4,), 3.0 / 2 ** (bits - 1), requires_grad=True)
    target = torch.randn(4, 6, 3, 3, generator=generator)
    (round_kernel(weight, scale, bits) * target).sum().backward()
    levels = 2 ** (bits - 1) - 1
    ratio = (weight / scale[:, None, None, None]).detach()
    rounded = (round_kernel(weight, scale, bits) / scale[:, None, None, None]).detach()
    inside = ratio.abs() <= levels
    expected = (target * torch.where(inside, rounded - ratio, rounded)).sum((1, 2, 3))
    torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad, target * inside)


def test_no_pair_of_rounded_weights_overflows_a_kernel_of_any_cpu() -> None:
    weight = torch.full((2, 4, 3, 3), 1.0)
    integers = (round_kernel(weight, torch.full((2,), 1 / 127)) * 127).round()
    assert largest_pair_sum(integers) <= INT16_MAX


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_conversion_gives_the_same_net_back(kind) -> None:
    net = make_net(**KINDS[kind])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    scales = observe_scales(net, [images_of(8)])
    back, learned = convert_qat(prepare_qat(net, scales))
    assert type(back) is RepVGG
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, layer in scales.layers.items():
        torch.testing.assert_close(learned.layers[name].weight, layer.weight, rtol=1e-5, atol=0)
        assert learned.layers[name].input == pytest.approx(layer.input, rel=1e-5)
    assert learned.pool == pytest.approx(scales.pool, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_training_starts_at_the_export(kind, form) -> None:
    net = make_net(**KINDS[kind]).requires_grad_(False)
    if form == "deploy":
        net = fuse(net, torch.float32).requires_grad_(False)
    calibration, images = images_of(40, 1), images_of(24, 2)
    fused = net if form == "deploy" else fuse(net, torch.float32).requires_grad_(False)
    start = start_training(net, [calibration], QUICK, QatOptions())
    exported = quantize(fused, [calibration], QUICK)
    student = start.student.eval()
    set_saturation(student, 255)
    # Removing dead inputs changes a net of random weights a little.
    assert relative(start.teacher(images), fused(images)) < 0.02
    # Both round at every layer, and a value on the border between two integers may fall to either side.
    error = relative(exported(images), fused(images))
    assert relative(student(images), exported(images)) < 0.25 * error
    converted, scales = convert_qat(student)
    applied = apply_scales(fuse(converted, torch.float32).requires_grad_(False), scales)
    assert relative(applied(images), student(images)) < 0.25 * error


@pytest.mark.slow
def test_the_weights_of_the_start_are_the_integers_of_the_export() -> None:
    net = build(load_checkpoint(DEMO))
    calibration = drawn(48, 31)
    start = start_training(net, [calibration], load_recipe(QUICK_RECIPE), QatOptions())
    exported = quantize(fuse(net, torch.float32), [calibration], load_recipe(QUICK_RECIPE))
    converted, scales = convert_qat(start.student)
    applied = apply_scales(fuse(converted, torch.float32).requires_grad_(False), scales)
    for name, layer in exported.integers().items():
        same = (applied.integers()[name].weight == layer.weight).double().mean()
        assert float(same) > 0.9999, name


@pytest.mark.parametrize("options", [QatOptions(6, 6), QatOptions(per_tensor=True), QatOptions(4, 8, True)], ids=str)
def test_fewer_bits_and_one_scale_per_layer(options) -> None:
    net = make_net()
    prepared = prepare_qat(net, observe_scales(net, [images_of(8)], options), options).eval()
    for block in prepared.modules():
        if isinstance(block, QatBlock):
            scale = block.weight_scale.detach()
            kernel, _ = equivalent_kernel_bias(block.block, torch.float32)
            integers = round_kernel(kernel, scale, options.weight_bits) / scale[:, None, None, None]
            assert float(integers.detach().abs().max()) <= 2 ** (options.weight_bits - 1) - 1 + 1e-3
            assert (len(set(scale.tolist())) == 1) == options.per_tensor
    assert torch.isfinite(prepared(images_of(2))).all()


@pytest.mark.parametrize("options", [QatOptions(6, 6), QatOptions(per_tensor=True)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "grouped"])
@pytest.mark.slow
def test_training_starts_with_error_feedback_whatever_the_integers(kind, options) -> None:
    net = make_net(groups=2 if kind == "grouped" else 1).requires_grad_(False)
    calibration, images = images_of(40, 1), images_of(24, 2)
    start = start_training(net, [calibration], QUICK, options)
    nearest = prepare_qat(net, observe_scales(net, [calibration], options), options)
    errors = []
    for student in (start.student.eval(), nearest.eval()):
        set_saturation(student, 255)
        errors.append(relative(student(images), start.teacher(images)))
        for block in student.modules():
            if isinstance(block, QatBlock):
                kernel, _ = equivalent_kernel_bias(block.block, torch.float32)
                scale = block.weight_scale.detach()[:, None, None, None]
                integers = kernel.detach() / scale
                if student is start.student:
                    # The branches are together the integers themselves.
                    assert float((integers - integers.round()).abs().max()) < 0.01
                    assert float(integers.abs().max()) < 2 ** (options.weight_bits - 1) - 0.9
    assert errors[0] < 0.9 * errors[1]


def test_running_statistics_follow_only_where_asked() -> None:
    net = make_net()
    scales = observe_scales(net, [images_of(8)])
    for moving in (False, True):
        prepared = prepare_qat(net, scales, QatOptions(moving_statistics=moving)).train()
        before = [m.running_mean.clone() for m in prepared.modules() if isinstance(m, nn.BatchNorm2d)]
        prepared(images_of(4))
        after = [m.running_mean for m in prepared.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) is not moving


@pytest.mark.slow
def test_any_module_with_blocks_is_trained_in_the_users_own_loop() -> None:
    torch.manual_seed(0)
    net = Segmenter().eval()
    images = images_of(8)
    exact = net(images).detach()
    options = QatOptions(weight_bits=4)
    prepared = prepare_qat(net, observe_scales(net, [images], options), options).train()
    optimizer = torch.optim.Adam(prepared.parameters(), lr=2e-4)
    losses = []
    for _ in range(40):
        loss = (prepared(images) - exact).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # Rounding makes single losses jump.
    assert sum(losses[-10:]) / 10 < 0.9 * losses[0]
    converted, scales = convert_qat(prepared)
    assert type(converted) is Segmenter
    assert set(scales.layers) == {"encoder.0", "encoder.1"}
    fused = fuse(converted)
    assert relative(fused(images), converted(images)) < 1e-4


@pytest.mark.slow
def test_what_cannot_be_trained_is_refused() -> None:
    net = make_net()
    with pytest.raises(DeployError, match="no scales for stages"):
        prepare_qat(net, QatScales({}))
    with pytest.raises(DeployError, match="no RepVGG block in training form"):
        prepare_qat(fuse(net), QatScales({}))
    with pytest.raises(DeployError, match="no block to convert"):
        convert_qat(net)
    with pytest.raises(DeployError, match="no block received a batch"):
        observe_scales(net, [])
    block = net.stages[1][1]
    with pytest.raises(DeployError, match="is itself a block, which has no name"):
        observe_scales(block, [torch.rand(1, 8, 8, 8)])
    for bits in (QatOptions, Grid):
        for options in ({"weight_bits": 1}, {"activation_bits": 9}):
            with pytest.raises(DeployError, match="_bits cannot be"):
                bits(**options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layer: replace(layer, weight=layer.weight[:-1]), "of 7 filters, but it has 8"),
        (lambda layer: replace(layer, weight=0 * layer.weight), "not all positive"),
        (lambda layer: replace(layer, input=math.nan), "not all positive"),
        (lambda layer: replace(layer, input=-1.0), "not all positive"),
    ],
)
def test_scales_that_cannot_be_those_of_the_block_are_refused(change, said) -> None:
    net = make_net()
    scales = observe_scales(net, [images_of(2)])
    layers = {**scales.layers, "stages.1.0": change(scales.layers["stages.1.0"])}
    with pytest.raises(DeployError, match=said):
        prepare_qat(net, replace(scales, layers=layers))
    with pytest.raises(DeployError, match=r"stages\.0\.0 is not of float32"):
        prepare_qat(net.half(), scales)


def test_only_eight_bits_behind_a_relu_take_turns() -> None:
    six = Grid(activation_bits=6)
    several = [FakeQuantizer(0.1), FakeQuantizer(0.1, unsigned=True), FakeQuantizer(0.1, six, unsigned=True)]
    set_saturation(nn.ModuleList(several), 255)
    assert [q.highest for q in several] == [127, 255, 63]


@pytest.mark.slow
def test_the_full_range_has_finer_activations_and_a_smaller_error() -> None:
    net = make_net().requires_grad_(False)
    calibration, images = images_of(40, 1), images_of(24, 2)
    begun = [start_training(net, [calibration], QUICK, QatOptions(full_range=full)) for full in (False, True)]
    errors, scales, inputs = [], [], []
    for start in begun:
        set_saturation(start.student, 255)
        errors.append(relative(start.student.eval()(images), start.teacher(images)))
        scales.append(convert_qat(start.student)[1])
        blocks = [block for block in start.student.modules() if isinstance(block, QatBlock)]
        inputs.append([block.input for block in blocks])
    assert errors[1] < 0.9 * errors[0]
    assert [found.full_range for found in scales] == [False, True]
    # The images are signed: nothing changes for them.
    assert scales[1].layers["stages.0.0"].input == pytest.approx(scales[0].layers["stages.0.0"].input)
    for narrow, wide in zip(inputs[0][1:], inputs[1][1:], strict=True):
        assert wide.scale < 0.75 * narrow.scale
    fresh = prepare_qat(net, scales[1], QatOptions(full_range=True))
    assert [q.highest for q in quantizers(fresh)] == [127] + [255] * (len(inputs[1]) + 1)
