"""Every activation, in both float types and in INT8: the graph computes what the torch net computes."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.small_nets import make_spec, randomize

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.graphs.training import to_training_onnx
from repvgg_deploy.nets.activations import NAMES, parse_activation
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization import load_recipe, quantize
from repvgg_deploy.quantization.equalize import equalize
from repvgg_deploy.quantization.qdq import to_qdq_onnx
from repvgg_deploy.quantization.state import QuantizationState
from repvgg_deploy.quantization.statistics import collect_statistics

QUICK = replace(load_recipe("fast"), augmentations=1)


def make(activation: str, **spec) -> RepVGG:
    net = RepVGG(replace(make_spec(**spec), activation=parse_activation(activation))).requires_grad_(False).eval()
    randomize(net)
    return net


def run(path, images) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images}), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_the_graph_has_the_nets_activation(name, images, tmp_path) -> None:
    net = make(name)
    fused = fuse(net, torch.float32)
    expected = net(images).numpy()
    write_graph(to_onnx(fused, FloatLayers(), GraphOptions(32, 32, opset=13), {}), tmp_path / "g.onnx")
    write_graph(to_training_onnx(net, GraphOptions(32, 32)), tmp_path / "t.onnx")
    for graph in ("g.onnx", "t.onnx"):
        given = run(tmp_path / graph, images.numpy())["logits"]
        assert np.abs(given - expected).max() < 1e-5 * np.abs(expected).max()
    half = to_onnx(fused, FloatLayers(np.dtype(np.float16)), GraphOptions(32, 32, io=Precision.FP32), {})
    write_graph(half, tmp_path / "h.onnx")
    given = run(tmp_path / "h.onnx", images.numpy())["logits"]
    assert np.abs(given - expected).max() < 2e-2 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leaky_relu:0.1", "silu", "relu6"])
def test_int8_is_integer_for_integer_what_is_simulated(name, images, tmp_path) -> None:
    fused = fuse(make(name), torch.float32).requires_grad_(False)
    calibration = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1)).numpy()
    quantized = quantize(fused, [calibration], QUICK)
    write_graph(to_qdq_onnx(quantized, GraphOptions(32, 32), {}), tmp_path / "g.onnx")
    given = run(tmp_path / "g.onnx", images.numpy())["logits"]
    simulated, exact = quantized(images).numpy(), fused(images).numpy()
    assert np.linalg.norm(given - simulated) < 0.05 * np.linalg.norm(simulated)
    assert np.linalg.norm(simulated - exact) < 0.2 * np.linalg.norm(exact)


@pytest.mark.parametrize(("name", "rescales"), [("leaky_relu:0.1", True), ("silu", False), ("relu6", False)])
def test_channels_are_rescaled_only_where_that_changes_nothing(name, rescales, images) -> None:
    fused = fuse(make(name), torch.float32).requires_grad_(False)
    before = fused(images)
    state = equalize(
        QuantizationState(fused, collect_statistics(fused, [images.numpy()]), replace(QUICK, equalize=0.5))
    )
    assert bool(state.factors) is rescales
    assert torch.allclose(state.net(images), before, rtol=1e-4, atol=1e-4)


def test_names_are_taken_as_libraries_write_them() -> None:
    assert [str(parse_activation(n)) for n in ("SiLU", "Swish", "HSwish", "hard_swish", "ReLU6", "LeakyReLU")] == [
        "silu", "silu", "hardswish", "hardswish", "relu6", "leaky_relu:0.01",
    ]  # fmt: skip
    for wrong in ("relux", "relu:2", "leaky_relu:x"):
        with pytest.raises(DeployError, match="no activation"):
            parse_activation(wrong)
