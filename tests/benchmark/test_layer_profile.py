"""Layer times: what the backends report is what is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from repvgg_deploy.benchmark.layer_profile import LayerTimes, make_layer_profiler, profile_graph
from repvgg_deploy.errors import DeployError, GraphError


def test_an_engines_profiler_collects_what_the_library_reports() -> None:
    module = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    times: LayerTimes = {}
    profiler = make_layer_profiler(module, times)
    assert isinstance(profiler, module.IProfiler)
    for layer, ms in (("conv1", 0.5), ("conv2", 0.25), ("conv1", 0.75)):
        profiler.report_layer_time(layer, ms)
    assert times == {("conv1", ""): [0.5, 0.75], ("conv2", ""): [0.25]}


def test_something_else_than_a_graph_has_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(b"PK")
    with pytest.raises(DeployError, match="is not an ONNX graph"):
        profile_graph(path, 1)


def test_a_graph_that_fails_while_it_runs_is_one_error(tmp_path: Path) -> None:
    def value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    # No batch of these images has seven values.
    nodes = [onnx.helper.make_node("Reshape", ["images", "shape"], ["logits"])]
    shape = onnx.numpy_helper.from_array(np.array([1, 7], np.int64), "shape")
    graph = onnx.helper.make_graph(
        nodes, "graph", [value("images", ["batch", 3, 8, 8])], [value("logits", ["batch", 7])], [shape]
    )
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(GraphError, match="does not run"):
        profile_graph(path, 1, seconds=0.1)
