"""Weights that no kernel with 16-bit pair sums can overflow: the bound, an emulated kernel, and the real ones."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from helpers.quantized_nets import QUICK, SHAPES, draw_images, fused_net
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from repvgg_deploy.benchmark.baseline_graphs import BaselineIntegers, find_ranges, to_baseline_onnx
from repvgg_deploy.benchmark.graphs import quantize_plainly
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import GraphError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.resnet import ResNet, ResNetSpec
from repvgg_deploy.nets.seeding import seed_weights
from repvgg_deploy.quantization import QuantizedNet, quantize
from repvgg_deploy.quantization.learned_rounding import _round_weights
from repvgg_deploy.quantization.net import IntegerLayer
from repvgg_deploy.quantization.pair_sums import INT16_MAX, count_taps, largest_pair_sum, neighbours, round_in_pairs
from repvgg_deploy.quantization.qdq import to_qdq_onnx, with_fp16_scales
from repvgg_deploy.quantization.rounding import choose_weight_scales, round_with_feedback

OPTIONS = GraphOptions(32, 32)
NETS = ("demo", *sorted(SHAPES))


def demo_net() -> RepVGG:
    net = fuse(build(load_checkpoint(data_folder("models") / "demo.safetensors")), torch.float32)
    assert isinstance(net, RepVGG)
    return net.requires_grad_(False)


@lru_cache
def quantized_net(name: str) -> QuantizedNet:
    net = demo_net() if name == "demo" else fused_net(name)
    return quantize(net, [draw_images(48)], QUICK)


def integer_layers(net: QuantizedNet) -> Iterator[tuple[str, IntegerLayer]]:
    for name in net.integers():
        layer = net.integer_layer(name)
        assert layer is not None
        yield name, layer


def pair_sums(integers: Tensor, layer: IntegerLayer, across_taps: bool) -> tuple[Tensor, Tensor]:
    """Sums (N, filters, pixels) of 0…255 `integers` with a layer's weights: exact, and as `vpmaddubsw` adds in pairs.

    Neighbours are those of one row of all taps with the channels innermost, as in ONNX Runtime (`across_taps`), or
    every tap begins anew, as in OpenVINO.
    """
    if layer.geometry is None:
        groups, patches = 1, integers.double()[:, :, None]
    else:
        groups, size = layer.geometry["groups"], layer.weight.shape[2:]
        where = {key: layer.geometry[key] for key in ("dilation", "padding", "stride")}
        patches = F.unfold(integers.double(), size, **where)
    taps, channels = count_taps(layer.weight), layer.weight.shape[1]
    # (N, groups, taps, channels, pixels) and (groups, filters of a group, taps, channels).
    x = patches.reshape(len(integers), groups, channels, taps, -1).transpose(2, 3)
    w = layer.weight.double().reshape(groups, -1, channels, taps).transpose(2, 3)
    if across_taps:
        x, w = x.reshape(*x.shape[:2], 1, -1, x.shape[-1]), w.reshape(*w.shape[:2], 1, -1)
    if x.shape[3] % 2:
        x, w = F.pad(x, [0, 0, 0, 1]), F.pad(w, [0, 1])
    products = x[:, :, None] * w[None, ..., None]
    pairs = products[..., 0::2, :] + products[..., 1::2, :]
    assert pairs.abs().max() < 2**53
    exact, kernel = (p.sum((3, 4)).flatten(1, 2) for p in (pairs, pairs.clamp(-(2**15), 2**15 - 1)))
    return exact, kernel


def worst_codes(layer: IntegerLayer, channels: int) -> Tensor:
    """Codes that drive single filters as far as they go: 255 wherever a filter's weights are of one sign, else 0."""
    if layer.geometry is None:
        return torch.cat([(layer.weight > 0) * 255, (layer.weight < 0) * 255])[:64]
    groups = layer.geometry["groups"]
    each = len(layer.weight) // groups
    images = []
    for number, kernel in enumerate(layer.weight[:24].int()):
        for signed in (kernel, -kernel):
            image = torch.zeros(channels, *kernel.shape[1:], dtype=torch.int32)
            first = number // each * kernel.shape[0]
            image[first : first + kernel.shape[0]] = (signed > 0) * 255
            images.append(image)
    return torch.stack(images)


@pytest.mark.slow
@pytest.mark.parametrize("across_taps", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_no_input_saturates_an_emulated_kernel(net: str, across_taps: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, layer in integer_layers(quantized_net(net)):
        assert largest_pair_sum(layer.weight) <= INT16_MAX, name
        groups = 1 if layer.geometry is None else layer.geometry["groups"]
        channels = layer.weight.shape[1] * groups
        shape = (2, channels) if layer.geometry is None else (2, channels, 7, 7)
        # Random bits make a large sum likelier than random integers do.
        drawn = torch.randint(0, 2, shape, generator=generator) * 255
        for integers in (drawn, worst_codes(layer, channels)):
            exact, kernel = pair_sums(integers, layer, across_taps)
            assert torch.equal(exact, kernel), name


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["plain", "grouped"])
def test_the_emulated_kernel_saturates_on_a_stem_that_uses_all_of_its_bits(shape: str) -> None:
    """As it was before pairs were limited: the images, held 128 higher, meet two large weights side by side."""
    quantized = copy.deepcopy(quantized_net(shape))
    layer = quantized.integer_layer("stages.0.0")
    assert layer is not None
    weight = quantized.float_net.stages[0][0].conv.weight.flatten(1)
    naive = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round()
    layer.weight.copy_(naive.reshape(layer.weight.shape))
    assert largest_pair_sum(layer.weight) > INT16_MAX
    held = quantized.point_integers(2 * draw_images(4, seed=5))["stages.0.0"] + 128
    exact, kernel = pair_sums(held, layer, across_taps=True)
    assert float((exact != kernel).double().mean()) > 0.001
    with pytest.raises(GraphError, match="does not fit 16 bits"):
        to_qdq_onnx(quantized, OPTIONS, {})


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7), st.sampled_from([1, 4, 9]), st.floats(0.2, 3.0), st.integers(0, 1000), st.sampled_from([0, 1])
)
def test_rounding_in_pairs_gives_the_nearest_integers_that_fit(
    channels: int, taps: int, spread: float, seed: int, weighted: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (127 * spread * torch.randn(20, channels * taps, generator=generator)).clamp(-150, 150)
    importance = torch.rand(channels * taps, generator=generator) if weighted else None
    rounded = round_in_pairs(values, taps, importance)
    assert torch.equal(rounded, rounded.round())
    assert float(rounded.abs().max()) <= 127
    assert largest_pair_sum(rounded.reshape(20, channels, taps)) <= INT16_MAX
    # Nothing else is moved: a column whose pairs all fit is rounded to the nearest.
    plain = values.clamp(-127, 127)
    crowded = torch.zeros(20, channels, taps, dtype=torch.bool)
    for first, second in neighbours(channels, taps):
        a, b = (plain.reshape(20, channels, taps)[index] for index in (first, second))
        crowded[first] |= (a + b).abs() > 128
        crowded[second] |= (a + b).abs() > 128
    assert torch.equal(rounded[~crowded.flatten(1)], plain[~crowded.flatten(1)].round())
    # And no sign turns.
    assert float((rounded * plain).min()) >= 0


def test_every_way_of_pairing_names_each_column_at_most_once() -> None:
    for channels, taps in ((1, 9), (2, 9), (3, 9), (5, 4), (8, 1), (7, 1)):
        numbers = torch.arange(channels * taps).reshape(1, channels, taps)
        ways = neighbours(channels, taps)
        # With an even number of channels both runtimes pair alike.
        assert len(ways) == (channels > 1) + (channels % 2 and taps > 1)
        for first, second in ways:
            named = torch.cat([numbers[first].flatten(), numbers[second].flatten()])
            assert len(named.unique()) == len(named) >= channels * taps - max(taps, 1)


def test_the_bound_is_reached() -> None:
    weight = torch.zeros(1, 2, 3, 3, dtype=torch.int8)
    weight[0, :, 1, 1] = torch.tensor([100, 28])
    assert largest_pair_sum(weight) == 255 * 128 <= INT16_MAX
    weight[0, 1, 1, 1] = 29
    assert largest_pair_sum(weight) == 255 * 129 > INT16_MAX
    # Of opposite signs one product alone is the largest.
    weight[0, 1, 1, 1] = -128
    assert largest_pair_sum(weight) == 255 * 128


@pytest.mark.parametrize("columns", [6, 27, 30])
def test_feedback_rounding_fits_and_leaves_less_error_than_the_nearest_that_fit(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    taps = 9 if columns == 27 else 1
    inputs = torch.randn(4000, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    covariance = inputs.t() @ inputs / len(inputs)
    weight = torch.randn(40, columns, generator=generator)
    scales = choose_weight_scales(weight, taps, covariance.diagonal())
    feedback = round_with_feedback(weight, scales, covariance, taps)
    nearest = round_in_pairs(weight / scales[:, None], taps, covariance.diagonal())
    for rounded in (feedback, nearest):
        assert largest_pair_sum(rounded.reshape(40, -1, taps)) <= INT16_MAX
        assert float(rounded.abs().max()) <= 127
    error = [(((r * scales[:, None] - weight) @ inputs.t()).square().mean()) for r in (feedback, nearest)]
    assert error[0] < error[1]


def test_a_scale_makes_room_where_two_large_weights_are_neighbours() -> None:
    weight = torch.tensor([[1.0, 0.98, 0.3, 0.11], [1.0, -0.98, 0.3, 0.11]])
    scales = choose_weight_scales(weight, 1)
    assert 1.7 < float(scales[0] / scales[1]) < 2.1


@pytest.mark.slow
def test_learned_integers_and_float16_scales_fit_too() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = 90 * torch.randn(8, 3, 3, 3, generator=generator)
    assert largest_pair_sum(_round_weights(weight)) <= INT16_MAX
    net = quantize(fused_net(), [draw_images(32)], replace(QUICK, learning=replace(QUICK.learning, steps=3, batch=4)))
    for _, layer in integer_layers(with_fp16_scales(net)):
        assert largest_pair_sum(layer.weight) <= INT16_MAX


@pytest.mark.slow
def test_the_graphs_to_compare_with_fit_too() -> None:
    plain = quantize_plainly(fused_net("grouped"), draw_images(8))
    assert all(largest_pair_sum(layer.weight) <= INT16_MAX for _, layer in integer_layers(plain))
    resnet = ResNet(ResNetSpec((1, 1, 1, 1), bottleneck=False, classes=7))
    seed_weights(resnet, 3)
    layers = BaselineIntegers(find_ranges(resnet, draw_images(4).numpy()))
    model = to_baseline_onnx(resnet, layers, OPTIONS, {}).to_proto()
    kernels = [item for item in model.graph.initializer if item.data_type == TensorProto.INT8 and len(item.dims) > 1]
    # The stem, two in each of four blocks, three where the shape changes, and the classifier.
    assert len(kernels) == 1 + 4 * 2 + 3 + 1
    for item in kernels:
        assert largest_pair_sum(torch.from_numpy(numpy_helper.to_array(item).copy())) <= INT16_MAX, item.name


needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
QEMU = shutil.which("qemu-x86_64")
needs_qemu = pytest.mark.skipif(QEMU is None or sys.platform != "linux", reason="qemu-user is not installed")
RUNTIMES = ["onnxruntime", pytest.param("openvino", marks=[needs_openvino, pytest.mark.exhaustive])]
HASWELL = pytest.param("Haswell", marks=needs_qemu)
"""The last but one generation of Intel's server CPUs without AVX-512 has the kernels of all that have AVX2 alone."""


def run_on(cpu: str, runtime: str, cases: dict[str, tuple[onnx.ModelProto, Tensor]], folder: Path) -> dict[str, Tensor]:
    """The output of every graph on its images, in a runtime on this CPU (`here`) or on one that qemu emulates."""
    folder = folder / cpu
    folder.mkdir()
    for name, (model, images) in cases.items():
        onnx.save(model, folder / f"{name}.onnx")
        np.save(folder / f"{name}.npy", images.float().numpy())
    emulator = [] if cpu == "here" else [str(QEMU), "-cpu", cpu]
    script = Path(__file__).parents[1] / "helpers" / "run_integers.py"
    done = subprocess.run([*emulator, sys.executable, script, runtime, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: torch.from_numpy(np.load(folder / f"{name}.out.npy")) for name in cases}


def extreme_codes(layer: IntegerLayer, signed: bool) -> Tensor:
    """Codes (N, channels, 7, 7) as a graph has them: random ones, and the worst for single filters around (2, 2)."""
    assert layer.geometry is not None
    channels = layer.weight.shape[1] * layer.geometry["groups"]
    worst = worst_codes(layer, channels)
    drawn = torch.randint(0, 2, (4, channels, 7, 7), generator=torch.Generator().manual_seed(2)) * 255
    # Zero is held at 128 where the input is signed.
    around = torch.full((len(worst), channels, 7, 7), 128 * signed)
    around[:, :, 1:4, 1:4] = worst
    return torch.cat([drawn, around]) - 128 * signed


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["here", HASWELL])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_real_kernels_compute_every_layer_exactly(runtime: str, cpu: str, tmp_path: Path) -> None:
    """Each convolution by itself, with integers that would saturate other weights, in steps of a power of two."""
    cases, expected = {}, {}
    for net in ("plain", "grouped"):
        for name, layer in integer_layers(quantized_net(net)):
            if layer.geometry is None:
                continue
            signed = name == "stages.0.0"
            integers = extreme_codes(layer, signed)
            sums = F.conv2d(integers.double(), layer.weight.double(), **layer.geometry)
            step = 2.0 ** np.ceil(np.log2(float(sums.abs().max()) / 127))
            cases[f"{net} {name}"] = (layer_model(layer, signed, step, list(integers.shape)), integers)
            expected[f"{net} {name}"] = (sums / step).round() * step
    for name, found in run_on(cpu, runtime, cases, tmp_path).items():
        assert torch.equal(found.double(), expected[name]), name


def layer_model(layer: IntegerLayer, signed: bool, step: float, shape: list[int]) -> onnx.ModelProto:
    """A graph of one integer convolution: `images` are integers, the output are its sums, rounded to `step`."""
    assert layer.geometry is not None
    code_type = np.int8 if signed else np.uint8
    filters = len(layer.weight)
    values = {
        "one": np.float32(1.0), "zero": code_type(0), "weight": layer.weight.numpy(),
        "bias": np.zeros(filters, np.float32), "ones": np.ones(filters, np.float32),
        "zeros": np.zeros(filters, np.int8), "step": np.float32(step), "middle": np.uint8(128),
    }  # fmt: skip
    geometry = layer.geometry
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "one", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "one", "zero"], ["inputs"]),
        helper.make_node("DequantizeLinear", ["weight", "ones", "zeros"], ["kernel"], axis=0),
        helper.make_node(
            "Conv", ["inputs", "kernel", "bias"], ["exact"],
            group=geometry["groups"], strides=list(geometry["stride"]), pads=[*geometry["padding"]] * 2,
        ),
        helper.make_node("QuantizeLinear", ["exact", "step", "middle"], ["outputs"]),
        helper.make_node("DequantizeLinear", ["outputs", "step", "middle"], ["sums"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.slow
@needs_qemu
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_whole_graphs_give_the_same_bits_on_an_older_cpu(runtime: str, tmp_path: Path) -> None:
    images = 2 * draw_images(16, seed=6)
    wide = quantize(fused_net("plain"), [draw_images(64, seed=1)], replace(QUICK, full_range=True))
    nets = {"plain": quantized_net("plain"), "grouped": quantized_net("grouped"), "full range": wide}
    cases = {name: (to_qdq_onnx(net, OPTIONS, {}).to_proto(), images) for name, net in nets.items()}
    here, older = (run_on(cpu, runtime, cases, tmp_path) for cpu in ("here", "Haswell"))
    for name, net in nets.items():
        assert torch.equal(here[name], older[name])
        expected = net(images)
        # OpenVINO's factor between two layers is another float32, so that a tie may round the other way.
        close = (here[name] - expected).abs().amax(1) < 1e-5 * expected.abs().max()
        assert float(close.double().mean()) >= {"onnxruntime": 1.0, "openvino": 0.5}[runtime]
