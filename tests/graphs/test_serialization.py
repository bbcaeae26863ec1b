"""An ONNX file is read without its weights, and ONNX Runtime finds them in the file all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.small_nets import make_net

from repvgg_deploy.errors import GraphError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.builder import OnnxGraph, write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.graphs.serialization import read_onnx_metadata, read_skeleton
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.runtime.onnxruntime import OnnxRunner


@pytest.fixture(scope="module")
def graph() -> OnnxGraph:
    net = fuse(make_net(), torch.float32)
    assert isinstance(net, RepVGG)
    return to_onnx(net, FloatLayers(), GraphOptions(32, 32, topk=3), {"key": "value"})


def test_the_skeleton_is_the_model_with_its_large_weights_elsewhere(graph: OnnxGraph, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    write_graph(graph, path)
    skeleton, whole = read_skeleton(path), onnx.load(path)
    assert skeleton.ByteSize() < path.stat().st_size / 2
    external = [item for item in skeleton.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
    assert len(external) > 5
    onnx.external_data_helper.load_external_data_for_model(skeleton, str(tmp_path))
    for item in skeleton.graph.initializer:
        item.ClearField("data_location")
    assert skeleton == whole
    assert read_onnx_metadata(path) == {"key": "value"}


@pytest.mark.parametrize("external_above", [0, 1 << 30])
def test_mapped_weights_give_the_same_outputs(
    graph: OnnxGraph, external_above: int, tmp_path: Path, monkeypatch
) -> None:
    write_graph(graph, tmp_path / "net.onnx", external_above)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    expected = OnnxRunner(tmp_path / "net.onnx").run(images)
    # A path without a folder is one as well.
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "net.onnx", Path("net.onnx")):
        outputs = OnnxRunner(path, quick_start=True).run(images)
        assert np.array_equal(outputs["classes"], expected["classes"])
        np.testing.assert_allclose(outputs["scores"], expected["scores"], rtol=1e-5)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_cut_file_is_an_error(graph: OnnxGraph, cut: int, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    write_graph(graph, path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(GraphError, match="damaged"):
        OnnxRunner(path, quick_start=True)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"PK\x03\x04 no graph at all"])
def test_another_file_is_no_graph(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError):
        OnnxRunner(path, quick_start=True)
