"""INT8 engines from this project's own quantization, scales in both float types."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.engine_graphs import PIXELS, make_net, narrow_spec, provenance, rtx_backend

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.engine import BuildOptions, build_engine
from repvgg_deploy.engine.network import parse_onnx
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.metadata import make_metadata
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.quantization.net import QuantizedNet
from repvgg_deploy.quantization.qdq import ActivationType, to_qdq_onnx
from repvgg_deploy.quantization.quantize import quantize
from repvgg_deploy.quantization.recipe import Recipe, RoundingOptions, ScaleOptions

QUICK = Recipe(
    "quick",
    count=32,
    scales=ScaleOptions(thresholds=(1.0,)),
    rounding=RoundingOptions(images=8, samples=256),
)


@lru_cache
def quantized_net(arch: str) -> QuantizedNet:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(16, 3, PIXELS, PIXELS, generator=generator) for _ in range(2)]
    return quantize(make_net(narrow_spec(arch)), images, QUICK)


@pytest.fixture(scope="module", params=["A0", "B1g4"])
def quantized(request: pytest.FixtureRequest) -> QuantizedNet:
    return quantized_net(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_quantized_net_becomes_an_engine_with_int8_convolutions(
    quantized: QuantizedNet, dtype: str, tmp_path: Path
) -> None:
    metadata = make_metadata(provenance(Precision.INT8))
    graph = to_qdq_onnx(quantized, GraphOptions(PIXELS, PIXELS), metadata, np.dtype(dtype))
    onnx = tmp_path / "net.int8.onnx"
    write_graph(graph, onnx)
    engine = build_engine(onnx, rtx_backend(), BuildOptions(timing_cache=False), tmp_path)
    assert engine.side.convolutions == {"int8": graph.op_histogram()["Conv"]}


@pytest.mark.slow
@pytest.mark.parametrize(("activation_type", "opset"), [("uint8", 13), ("uint8", 21), ("int8", 13), ("int8", 17)])
def test_both_kinds_of_file_build_at_every_opset_that_the_table_names(
    activation_type: ActivationType, opset: int, tmp_path: Path
) -> None:
    options, metadata = GraphOptions(PIXELS, PIXELS, opset=opset), make_metadata(provenance(Precision.INT8))
    graph = to_qdq_onnx(quantized_net("A0"), options, metadata, activation_type=activation_type)
    write_graph(graph, tmp_path / "net.onnx")
    engine = build_engine(tmp_path / "net.onnx", rtx_backend(), BuildOptions(timing_cache=False), tmp_path)
    assert engine.side.convolutions == {"int8": graph.op_histogram()["Conv"]}


@pytest.mark.slow
def test_the_parser_reads_unsigned_activations_as_int8(tmp_path: Path) -> None:
    """What the one file rests on: a uint8 zero-point of 0 is int8 to TensorRT."""
    graph = to_qdq_onnx(quantized_net("A0"), GraphOptions(PIXELS, PIXELS), make_metadata(provenance(Precision.INT8)))
    write_graph(graph, tmp_path / "net.onnx")
    network = parse_onnx(rtx_backend(), tmp_path / "net.onnx").network
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    pairs = [layer for layer in layers if layer.type.name == "QUANTIZE"]
    assert len(pairs) == graph.op_histogram()["QuantizeLinear"]
    assert {layer.get_output(0).dtype.name for layer in pairs} == {"INT8"}
