"""Quantizing on another device than the CPU: nothing is left behind on the CPU, and the result is the CPU's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantized_nets import QUICK, SHAPES, draw_images, in_batches
from helpers.second_device import SECOND, MixedDevices, OnSecond, second_device, to_first, to_second
from helpers.small_nets import make_net
from torch import nn

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.progress import SILENT
from repvgg_deploy.quantization import quantize
from repvgg_deploy.quantization.mixed_precision import DropLimit, quantize_within, rank_layers
from repvgg_deploy.quantization.quantize import quantize_apart
from repvgg_deploy.quantization.recipe import LearningOptions
from repvgg_deploy.workflows.export_request import Int8Request
from repvgg_deploy.workflows.int8 import Int8Source, quantize_for_export

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    with second_device():
        there = torch.ones(3, device=SECOND)
        assert torch.equal((there + there * 2).cpu(), torch.full((3,), 3.0))
        with pytest.raises(MixedDevices):
            there + torch.ones(3)
        with pytest.raises(MixedDevices):
            there / torch.tensor(3.0)


def tiny_net(shape: str = "plain") -> RepVGG:
    """Each of its layers has few columns: the pretended device takes its time for every operator."""
    net = fuse(make_net(blocks=(1, 2), widths=(4, 4, 4), **SHAPES[shape]))
    assert isinstance(net, RepVGG)
    return net.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_net_on_another_device_is_quantized_there(shape: str) -> None:
    net, images = tiny_net(shape), draw_images(16)
    recipe = replace(QUICK, augmentations=2, learning=LearningOptions(steps=2, batch=16))
    here = quantize(net, in_batches(images, 32), recipe)
    with second_device():
        there = quantize(to_second(copy.deepcopy(net)), in_batches(images, 32), recipe)
        assert all(isinstance(value, OnSecond) for value in (*there.buffers(), *there.parameters()))
        logits = there(images.to(SECOND)).cpu()
    assert torch.equal(logits, here(images))


@pytest.mark.slow
def test_layers_are_ranked_and_kept_float_on_another_device() -> None:
    net, images = tiny_net(), draw_images(16)
    drops = iter([5.0, 0.5, 0.5])
    with second_device():
        moved = to_second(copy.deepcopy(net))
        apart = quantize_apart(moved, [images], QUICK)
        ranking = rank_layers(apart, images.to(SECOND))
        mixed = quantize_within(moved, [images], QUICK, DropLimit(lambda _: next(drops), 1.0))
    expected = rank_layers(quantize_apart(net, [images], QUICK), images)
    assert ranking == expected
    assert mixed.kept_float


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [False, True], ids=["images", "made pictures"])
def test_the_int8_stage_of_an_export_runs_on_the_device_and_returns_to_the_cpu(
    pictures: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `--calib-device cuda` does, from the calibration images to the net that becomes a graph."""
    training = make_net(blocks=(1, 2), widths=(4, 4, 4)).requires_grad_(False)
    net = fuse(training, torch.float32).requires_grad_(False)
    write_image_folder(tmp_path, 12, seed=1, size=32)
    recipe = tmp_path / "quick.toml"
    recipe.write_text("count = 12\n[pictures]\ncount = 4\nsteps = 2\n")
    request = Int8Request(None if pictures else tmp_path, recipe=recipe)
    source = Int8Source(net, training, Preprocessing(32, 32, 32), "a" * 64)
    here, _ = quantize_for_export(source, request, False, SILENT)
    images = draw_images(4)
    moves, moved = nn.Module.to, []

    def move(module: nn.Module, *target: Any, **options: Any) -> nn.Module:
        if target[:1] != ("cuda",):
            return moves(module, *target, **options)
        moved.append(module)
        return to_second(module)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(nn.Module, "cpu", to_first)
    with second_device():
        there, _ = quantize_for_export(source, replace(request, device="cuda"), False, SILENT)
    assert torch.equal(there(images), here(images))
    # The fused net, and the training form where pictures are made from it.
    assert len(moved) == 1 + pictures
