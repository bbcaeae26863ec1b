"""Weights outside a graph's file are read from its own folder, and from nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.engine_graphs import PIXELS, small_onnx
from onnx import TensorProto

from repvgg_deploy.errors import GraphError
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.runtime.session import GraphSession
from repvgg_deploy.workflows.inspect import inspect_file


def move_weight(path: Path, location: str, place: Path) -> Path:
    """The graph at `path` with its largest weight in the file `place`, which it calls `location`."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda item: len(item.raw_data))
    place.write_bytes(weight.raw_data)
    for key, value in {"location": location, "offset": "0", "length": str(len(weight.raw_data))}.items():
        weight.external_data.add(key=key, value=value)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return small_onnx(tmp_path / "inside")


@pytest.mark.slow
def test_data_beside_the_graph_are_read(graph: Path) -> None:
    images = np.random.default_rng(0).standard_normal((1, 3, PIXELS, PIXELS)).astype(np.float32)
    expected = OnnxRunner(graph).run(images)
    moved = OnnxRunner(move_weight(graph, "weights.bin", graph.with_name("weights.bin"))).run(images)
    assert all(np.array_equal(moved[name], values) for name, values in expected.items())


@pytest.mark.parametrize("kind", ["above", "absolute", "through a folder"])
@pytest.mark.parametrize("how", ["run", "quick start", "session"])
def test_data_outside_the_folder_are_refused(kind: str, how: str, graph: Path, tmp_path: Path) -> None:
    place = tmp_path / "secret.bin"
    location = {"above": "../secret.bin", "absolute": str(place), "through a folder": "./x/../../secret.bin"}[kind]
    move_weight(graph, location, place)
    (graph.parent / "x").mkdir()
    with pytest.raises(GraphError) as raised:
        GraphSession(graph) if how == "session" else OnnxRunner(graph, quick_start=how == "quick start")
    assert raised.value.message.isprintable()


@pytest.mark.parametrize("location", ["../secret.bin", "/dev/zero", "", "missing.bin"])
def test_inspecting_reads_no_external_data(location: str, graph: Path, tmp_path: Path) -> None:
    described = inspect_file(move_weight(graph, location, tmp_path / "secret.bin"))
    assert described["external_data"]
