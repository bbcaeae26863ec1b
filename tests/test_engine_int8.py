"""INT8 engines from this project's own quantization: every place of the Q/DQ pairs, scales in both float types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_graphs import PIXELS, make_net, narrow_spec, provenance, rtx_backend

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.engine import BuildOptions, build_engine
from repvgg_deploy.onnx_export import GraphOptions, make_metadata
from repvgg_deploy.onnx_graph import write_graph
from repvgg_deploy.quantize.qdq import Placement, to_qdq_onnx
from repvgg_deploy.quantize.quantization import quantize
from repvgg_deploy.quantize.quantized_net import QuantizedNet
from repvgg_deploy.quantize.recipe import Recipe, RoundingOptions, ScaleOptions

QUICK = Recipe(
    "quick",
    count=32,
    scales=ScaleOptions("minmax"),
    rounding=RoundingOptions("nearest", compensate=False, correct_bias=False),
)


@pytest.fixture(scope="module", params=["A0", "B1g4"])
def quantized(request: pytest.FixtureRequest) -> QuantizedNet:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(16, 3, PIXELS, PIXELS, generator=generator) for _ in range(2)]
    return quantize(make_net(narrow_spec(request.param)), images, QUICK)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("placement", list(Placement))
def test_a_quantized_net_becomes_an_engine_with_int8_convolutions(
    quantized: QuantizedNet, placement: Placement, dtype: str, tmp_path: Path
) -> None:
    metadata = make_metadata(provenance(Precision.INT8))
    graph = to_qdq_onnx(quantized, GraphOptions(PIXELS, PIXELS), metadata, np.dtype(dtype), placement)
    onnx = tmp_path / "net.int8.onnx"
    write_graph(graph, onnx)
    engine = build_engine(onnx, rtx_backend(), BuildOptions(timing_cache=False), tmp_path)
    assert engine.side.convolutions == {"int8": graph.op_histogram()["Conv"]}
