"""Nets written as graphs to be timed: fp32, fp16 or int8, a RepVGG and a net to compare with in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from repvgg_deploy.artifacts import Precision, Preprocessing
from repvgg_deploy.benchmark.baseline_graphs import BaselineFloats, BaselineIntegers, find_ranges, to_baseline_onnx
from repvgg_deploy.graphs.builder import OnnxGraph, write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.metadata import METADATA_PREFIX
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.graphs.training import to_training_onnx
from repvgg_deploy.nets.baselines import BaselineNet
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.net import QuantizedNet
from repvgg_deploy.quantization.pair_sums import count_taps
from repvgg_deploy.quantization.points import CLASSIFIER, POOL, fused_blocks, walk
from repvgg_deploy.quantization.qdq import to_qdq_onnx
from repvgg_deploy.quantization.reconstruct import Layer
from repvgg_deploy.quantization.rounding import choose_weight_scales, round_weights
from repvgg_deploy.quantization.state import LayerIntegers, Reconstruction

_CALIBRATION_IMAGES = 2


@dataclass(frozen=True)
class NamedNet:
    """A net with the name and figures that the tables show."""

    name: str
    net: RepVGG | BaselineNet
    size: int
    top1: float | None = None

    @property
    def in_channels(self) -> int:
        """Of the input."""
        return self.net.spec.in_channels

    @property
    def parameters(self) -> int:
        """All weights and biases."""
        return sum(parameter.numel() for parameter in self.net.parameters())


def write_net(
    named: NamedNet,
    precision: Precision,
    form: str,
    folder: Path,
    for_engine: bool = False,
    input_type: str = "float32",
) -> Path:
    """Write the graph of `named` to `folder` and return its path.

    In int8 the scales are those of a few images of noise, rounded to nearest: that is enough to time it, and says
    nothing of its accuracy, which `export --int8` sees to. The Q/DQ nodes stand where `export` puts them.

    Args:
        named: a RepVGG in the form `form`, or a baseline.
        precision: of the graph; the training form has fp32 only.
        form: `deploy` or `training`.
        folder: where to.
        for_engine: place the Q/DQ nodes of a baseline for TensorRT, not for ONNX Runtime.
        input_type: float32, float16 (the output as well), or uint8: NHWC pixels that the graph normalizes.
    """
    options = _graph_options(named, input_type)
    metadata = {
        METADATA_PREFIX + "precision": str(precision),
        METADATA_PREFIX + "form": "train" if form == "training" else "deploy",
        METADATA_PREFIX + "arch": named.name,
    }
    if form == "training":
        graph = to_training_onnx(cast(RepVGG, named.net), options)
    elif isinstance(named.net, RepVGG):
        graph = _repvgg_graph(named, precision, options, metadata)
    else:
        graph = _baseline_graph(named, precision, options, metadata, for_engine)
    taking = "" if input_type == "float32" else f".{input_type}"
    path = folder / f"{named.name}.{form}{taking}.{precision}.onnx"
    write_graph(graph, path)
    return path


def _graph_options(named: NamedNet, input_type: str) -> GraphOptions:
    pixels = Preprocessing(named.size, named.size, named.size, (0.5,) * named.in_channels, (0.5,) * named.in_channels)
    return GraphOptions(
        named.size,
        named.size,
        io=Precision.FP16 if input_type == "float16" else Precision.FP32,
        uint8_input=pixels if input_type == "uint8" else None,
    )


def _noise(named: NamedNet) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    shape = (_CALIBRATION_IMAGES, named.in_channels, named.size, named.size)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _repvgg_graph(named: NamedNet, precision: Precision, options: GraphOptions, metadata: dict[str, str]) -> OnnxGraph:
    net = cast(RepVGG, named.net)
    if precision is Precision.INT8:
        quantized = quantize_plainly(net, torch.from_numpy(_noise(named)))
        return to_qdq_onnx(quantized, options, metadata)
    dtype = np.dtype(np.float16 if precision is Precision.FP16 else np.float32)
    return to_onnx(net, FloatLayers(dtype), options, metadata)


def _baseline_graph(
    named: NamedNet, precision: Precision, options: GraphOptions, metadata: dict[str, str], for_engine: bool
) -> OnnxGraph:
    net = cast(BaselineNet, named.net)
    if precision is Precision.INT8:
        layers = BaselineIntegers(find_ranges(net, _noise(named)), for_engine)
        return to_baseline_onnx(net, layers, options, metadata)
    dtype = np.dtype(np.float16 if precision is Precision.FP16 else np.float32)
    return to_baseline_onnx(net, BaselineFloats(dtype), options, metadata)


@torch.no_grad()
def quantize_plainly(net: RepVGG, images: Tensor) -> QuantizedNet:
    """A fused net in int8 with the largest magnitudes of `images` as ranges and weights rounded to nearest."""
    scales = {name: max(float(x.abs().max()), 1e-6) / 127 for name, x in walk(net, images)}
    layers: dict[str, Layer] = {name: block.conv for name, block in fused_blocks(net)}
    layers[CLASSIFIER] = net.classifier
    integers = {}
    for name, layer in layers.items():
        rows = layer.weight.flatten(1)
        taps = count_taps(layer.weight)
        weight_scale = choose_weight_scales(rows, taps)
        weight = round_weights(rows, weight_scale, taps).to(torch.int8).reshape(layer.weight.shape)
        integers[name] = LayerIntegers(weight, weight_scale, cast(Tensor, layer.bias), scales[name])
    return QuantizedNet(net, Reconstruction(integers, scales[POOL]))
