"""Quantizing on another device than the CPU: nothing is left behind on the CPU, and the result is the CPU's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.quantized_nets import QUICK, SHAPES, draw_images, in_batches
from helpers.second_device import SECOND, MixedDevices, OnSecond, second_device, to_second
from helpers.small_nets import make_net

from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization import quantize
from repvgg_deploy.quantization.mixed_precision import DropLimit, quantize_within, rank_layers
from repvgg_deploy.quantization.quantize import quantize_apart
from repvgg_deploy.quantization.recipe import LearningOptions

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
