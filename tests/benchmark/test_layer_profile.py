"""Layer times: what the backends report is what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from repvgg_deploy.benchmark.layer_profile import LayerTimes, make_layer_profiler, profile_graph
from repvgg_deploy.errors import DeployError


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
