"""Quantizing on a real GPU: the same net as on the CPU, up to the order of sums."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.quantized_nets import draw_images, fused_net, in_batches

from repvgg_deploy.cli.main import main
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.quantization import Recipe, quantize
from repvgg_deploy.quantization.layer_report import signal_to_noise_db
from repvgg_deploy.quantization.mixed_precision import rank_layers
from repvgg_deploy.quantization.quantize import quantize_apart
from repvgg_deploy.quantization.recipe import LearningOptions, RoundingOptions

# Of torch's own: TF32 switches that are to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = Recipe("quick", augmentations=2, rounding=RoundingOptions(images=128, samples=4096))


@pytest.mark.parametrize("steps", [0, 60])
def test_a_gpu_quantizes_as_well_as_the_cpu(cuda_torch: Any, steps: int) -> None:
    torch = cuda_torch
    net, images = fused_net(), draw_images(96)
    recipe = replace(QUICK, learning=LearningOptions(steps=steps, batch=16))
    exact = net(images)
    here = quantize(net, in_batches(images, 32), recipe)
    there = quantize(copy.deepcopy(net).cuda(), in_batches(images, 32), recipe)
    values = list(there.layers.buffers())
    assert values
    assert all(value.is_cuda for value in values)
    on_gpu = there(images.cuda()).cpu()
    there = there.cpu()
    # Sums of integers are exact on both, with TF32 off or on.
    assert torch.allclose(on_gpu, there(images), rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    ratios = [signal_to_noise_db(exact, found(images)) for found in (here, there)]
    assert ratios[0] == pytest.approx(ratios[1], abs=1.0)


def test_layers_are_ranked_on_a_gpu(cuda_torch: Any) -> None:
    del cuda_torch
    net, images = fused_net(), draw_images(64)
    here = rank_layers(quantize_apart(net, [images], QUICK), images)
    there = rank_layers(quantize_apart(net.cuda(), [images], QUICK), images.cuda())
    errors = [{layer.name: layer.error for layer in ranking} for ranking in (here, there)]
    assert errors[0] == pytest.approx(errors[1], rel=0.3)


def test_the_command_line_quantizes_on_a_gpu(cuda_torch: Any, tmp_path: Path) -> None:
    del cuda_torch
    write_image_folder(tmp_path / "images", 96, seed=11, size=64)
    arguments = [str(data_folder("models") / "demo.safetensors"), "--int8", "--calib", str(tmp_path / "images")]
    result = CliRunner().invoke(
        main, ["export", *arguments, "--calib-device", "cuda", "--engine", "none", "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "demo.int8.onnx").exists()
