"""`make_pictures`: calibration pictures from the BN statistics of a net in training form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.quantized_nets import QUICK
from helpers.small_nets import make_net
from torch import Tensor, nn

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.images.synthetic import draw_images
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization import quantize
from repvgg_deploy.quantization.data_free import make_pictures, plan_pictures
from repvgg_deploy.quantization.recipe import PictureOptions, RoundingOptions

DEMO = data_folder("models") / "demo.safetensors"
DEMO_SIZE = Preprocessing(64, 64, 64)
SMALL = Preprocessing(32, 32, 32)
FEW = PictureOptions(count=16, batch=8, steps=12)


def statistics_of_inputs(net: RepVGG, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean and variance of what each BN reads, by a run of its own."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = (inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3), correction=0))

        return hook

    norms = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(keep(name)) for name, norm in norms]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return seen


class Steps:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def note(self, text: str, /) -> None:
        pass

    def step(self, name: str, done: float, total: float, /) -> None:
        assert name == "synthesizing images"
        self.seen.append((done, total))


@pytest.mark.slow
def test_the_pictures_have_the_statistics_of_the_training_images() -> None:
    net = build(load_checkpoint(DEMO))
    made, noise = (make_pictures(net, DEMO_SIZE, PictureOptions(16, 16, steps)).pictures for steps in (30, 1))
    norms = dict(net.named_modules())

    def error(images: Tensor) -> float:
        found = statistics_of_inputs(net, images)
        shifts = [((mean - norms[n].running_mean) ** 2 / norms[n].running_var).mean() for n, (mean, _) in found.items()]
        ratios = [((var / norms[n].running_var).sqrt() - 1).square().mean() for n, (_, var) in found.items()]
        return float(torch.stack(shifts + ratios).mean())

    assert error(made) < 0.35 * error(noise)
    assert error(made) < 0.1


@pytest.mark.slow
def test_the_pictures_have_the_range_of_images() -> None:
    made = make_pictures(make_net(), SMALL, FEW)
    pixels = made.pictures * torch.tensor(SMALL.std)[:, None, None] + torch.tensor(SMALL.mean)[:, None, None]
    assert made.pictures.shape == (16, 3, 32, 32)
    assert float(pixels.min()) >= -1e-6
    assert float(pixels.max()) <= 1 + 1e-6
    assert float(pixels.std()) > 0.05


@pytest.mark.slow
def test_the_seed_decides_all() -> None:
    first, again = (make_pictures(make_net(), SMALL, FEW).pictures for _ in range(2))
    other = make_pictures(make_net(), SMALL, FEW, seed=1).pictures
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:8], first[8:])


@pytest.mark.slow
def test_the_net_stays_as_it_is() -> None:
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    make_pictures(net, SMALL, FEW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_deploy_form_has_no_statistics_to_make_pictures_from() -> None:
    with pytest.raises(DeployError, match="deploy form: it has no BN statistics") as caught:
        make_pictures(fuse(make_net()), SMALL, FEW)
    assert "--calib DIR" in caught.value.hint


@pytest.mark.slow
def test_where_the_time_is_short_fewer_steps_are_taken_and_told_of() -> None:
    steps = Steps()
    options = PictureOptions(count=16, batch=8, steps=2000)
    made = make_pictures(make_net(), SMALL, options, seconds=0.3, progress=steps)
    assert made.summary.cut_short
    assert made.summary.steps < 2000
    assert 0 < steps.seen[-1][0] < 4000
    assert {total for _, total in steps.seen} == {4000}
    assert not make_pictures(make_net(), SMALL, FEW, seconds=600).summary.cut_short


@pytest.mark.slow
def test_the_work_is_bounded_whatever_the_size_of_the_net() -> None:
    options = PictureOptions()
    small, wide = (RepVGG(find_card(arch).spec()) for arch in ("A0", "B1"))
    assert plan_pictures(small, Preprocessing(64, 64, 64), options) == (256, 64, 64)
    count, height, width = plan_pictures(small, Preprocessing(), options)
    assert 128 <= count < 256
    assert 64 < height == width < 224
    count, height, width = plan_pictures(wide, Preprocessing(), options)
    assert (height, width) == (64, 64)
    assert 32 <= count < 128
    assert plan_pictures(small, Preprocessing(32, 48, 48), options) == (256, 32, 48)
    # No more than were asked for.
    assert plan_pictures(wide, Preprocessing(), replace(options, count=8, multiply_adds=0.1)) == (8, 64, 64)


@pytest.mark.slow
def test_pictures_calibrate_as_images_do() -> None:
    net = build(load_checkpoint(DEMO))
    fused = fuse(net, torch.float32)
    pixels, _ = draw_images(96, 12)
    images = torch.from_numpy(normalize(pixels, DEMO_SIZE))
    recipe = replace(QUICK, rounding=RoundingOptions(images=32, samples=4096))
    made = make_pictures(net, DEMO_SIZE, PictureOptions(count=32, batch=32, steps=30))
    noise = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fused.requires_grad_(False)
    exact = fused(images)
    errors = [
        float((quantize(fused, calibration, recipe)(images) - exact).norm() / exact.norm())
        for calibration in (made, [noise])
    ]
    assert errors[0] < 0.1
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:12 calibration images are few")
@pytest.mark.parametrize("name", [
    "holocron_train.pth", "official_grouped.pth", "official_se.pth", "official_train.pth", "openmmlab_train.pth",
    "qarepvgg_v2_train.pth", "repvggplus_train.pth", "timm_train.safetensors", "official_ddp_wrapped.pth.tar",
])  # fmt: skip
def test_every_layout_in_training_form_runs(shared: Path, name: str) -> None:
    net = build(load_checkpoint(shared / "golden" / name))
    preprocessing = Preprocessing(32, 32, 32, (0.5,) * net.spec.in_channels, (0.5,) * net.spec.in_channels)
    made = make_pictures(net, preprocessing, PictureOptions(count=12, batch=12, steps=16))
    assert made.summary.distance < made.summary.start_distance
    assert torch.isfinite(quantize(fuse(net, torch.float32), made, QUICK)(made.pictures[:4])).all()
