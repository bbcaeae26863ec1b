"""Every graph that is written is as simple as onnxsim makes it; one that is not is an error."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.quantized_nets import QUICK, SHAPES, draw_images, fused_net
from helpers.small_nets import make_net
from onnx import helper

from repvgg_deploy.artifacts import Precision, Preprocessing
from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import OnnxGraph
from repvgg_deploy.graphs.repvgg import FloatLayers, GraphOptions, to_onnx
from repvgg_deploy.graphs.simplification import SimplificationCheck, find_simplification
from repvgg_deploy.graphs.training import to_training_onnx
from repvgg_deploy.quantization import quantize
from repvgg_deploy.quantization.qdq import to_qdq_onnx

PIXELS = Preprocessing(32, 32, 32)


@pytest.fixture
def onnxsim_process() -> None:
    """The process is what is tested here."""


OPTIONS = {
    "plain": GraphOptions(32, 32),
    "fixed batch, softmax": GraphOptions(32, 32, batch=2, softmax=True),
    "uint8, top 3, fp16": GraphOptions(32, 32, io=Precision.FP16, uint8_input=PIXELS, topk=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_float_graphs_cannot_be_simpler(shape: str, options: str, dtype: type[np.floating]) -> None:
    graph = to_onnx(fused_net(shape), FloatLayers(np.dtype(dtype)), OPTIONS[options], {})
    assert find_simplification(graph.without_values()) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:8 calibration images are few")
@pytest.mark.parametrize(
    ("shape", "kept"), [*((shape, ()) for shape in SHAPES), ("plain", ("stages.0.0", "classifier"))]
)
def test_int8_graphs_cannot_be_simpler(shape: str, kept: tuple[str, ...]) -> None:
    quantized = quantize(fused_net(shape), [draw_images(8)], QUICK, keep_float=kept)
    for options in OPTIONS.values():
        graph = to_qdq_onnx(quantized, options, {})
        assert find_simplification(graph.without_values()) is None


@pytest.mark.slow
def test_training_graphs_cannot_be_simpler() -> None:
    for shape in SHAPES.values():
        graph = to_training_onnx(make_net(**shape), GraphOptions(32, 32))
        assert find_simplification(graph.without_values()) is None


NODES = len(to_onnx(fused_net(), FloatLayers(), GraphOptions(32, 32), {}).model.graph.node)
LESS = f"{NODES + 1} nodes become {NODES}"


@pytest.fixture
def wordy() -> OnnxGraph:
    """A graph with a node that does nothing."""
    graph = to_onnx(fused_net(), FloatLayers(), GraphOptions(32, 32), {})
    first = graph.model.graph.node[0]
    graph.model.graph.node.insert(0, helper.make_node("Identity", [first.input[0]], ["copied"]))
    graph.model.graph.node[1].input[0] = "copied"
    return graph


@pytest.mark.slow
def test_a_node_that_does_nothing_is_found_in_this_process_and_in_another(wordy: OnnxGraph) -> None:
    assert find_simplification(wordy.without_values()) == LESS
    with SimplificationCheck() as check:
        check.submit(wordy.without_values())
        with pytest.raises(GraphError, match=LESS):
            check.require()


@pytest.mark.slow
def test_the_other_process_agrees_and_ends() -> None:
    with SimplificationCheck() as check:
        check.submit(to_onnx(fused_net(), FloatLayers(), GraphOptions(32, 32), {}).without_values())
        check.require()
    assert check._process.returncode is not None


def test_a_check_that_is_not_needed_is_ended_at_once() -> None:
    with SimplificationCheck() as check:
        pass
    assert check._process.returncode is not None


def test_where_onnxsim_cannot_be_loaded_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    graph = to_onnx(fused_net(), FloatLayers(), GraphOptions(32, 32), {})
    with SimplificationCheck() as check:
        check.submit(graph.without_values())
        with pytest.raises(GraphError, match="could not be checked by onnxsim: Module"):
            check.require()
