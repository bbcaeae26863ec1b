"""Nets written to be timed: they are the nets, in the precision and form that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from helpers.small_nets import logits_of, make_net, relative

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.benchmark.graphs import NamedNet, quantize_plainly, write_net
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.seeding import seed_weights
from repvgg_deploy.runtime.onnxruntime import OnnxRunner


@pytest.fixture
def training() -> RepVGG:
    net = make_net()
    seed_weights(net, 3)
    return net


@pytest.mark.parametrize(
    ("precision", "form", "limit"),
    [
        (Precision.FP32, "deploy", 5e-6),
        (Precision.FP32, "training", 5e-6),
        (Precision.FP16, "deploy", 1e-2),
        # Ranges of noise and a net of random weights; a wrong scale or axis would give an error above 1.
        (Precision.INT8, "deploy", 0.6),
    ],
)
def test_the_graph_is_the_net(
    precision: Precision, form: str, limit: float, training: RepVGG, images: torch.Tensor, tmp_path: Path
) -> None:
    net = training if form == "training" else cast(RepVGG, fuse(training, torch.float32))
    path = write_net(NamedNet("small", net, 32), precision, form, tmp_path)
    runner = OnnxRunner(path)
    assert runner.precision == str(precision)
    logits = torch.from_numpy(runner.run(images.numpy())["logits"])
    assert relative(logits, logits_of(training, images)) < limit


def test_plain_quantization_makes_every_layer_an_integer_one(training: RepVGG, images: torch.Tensor) -> None:
    fused = cast(RepVGG, fuse(training, torch.float32))
    quantized = quantize_plainly(fused, images)
    assert quantized.float_layers() == ()
    assert all(layer.weight.dtype == torch.int8 for layer in quantized.integers().values())


def test_seeded_activations_neither_vanish_nor_overflow(training: RepVGG, images: torch.Tensor) -> None:
    x = images
    for block in training.blocks():
        x = block(x)
        assert 0.05 < float(x.square().mean().sqrt()) < 50


def test_the_training_form_has_the_parameters_of_all_branches(training: RepVGG) -> None:
    fused = cast(RepVGG, fuse(training, torch.float32))
    assert NamedNet("a", training, 32).parameters > NamedNet("a", fused, 32).parameters
    assert NamedNet("a", fused, 32).parameters == sum(np.prod(p.shape) for p in fused.state_dict().values())
