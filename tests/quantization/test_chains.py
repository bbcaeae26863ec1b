"""Chains of convolutions in a graph, and where the pairs go."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.quantization.chain_graph import input_scale, insert_chains, is_nonnegative, prune
from repvgg_deploy.quantization.chains import GraphReaders, QuantizedChain, find_chains, quantize_chain, to_blocks
from repvgg_deploy.quantization.layer_inputs import Streams
from repvgg_deploy.quantization.pair_sums import INT16_MAX, largest_pair_sum
from repvgg_deploy.quantization.recipe import Recipe
from repvgg_deploy.runtime.session import GraphSession

CHANNELS = 4


def graph_of(nodes: list[tuple[str, list[str], str]], outputs: list[str]) -> onnx.ModelProto:
    """Nodes as (operator, inputs, output); a Conv has a 3x3 kernel and a bias of its own."""
    generator = np.random.default_rng(0)
    made, constants = [], []
    for op, inputs, output in nodes:
        attributes = {"pads": [1, 1, 1, 1]} if op == "Conv" else {"axis": 1} if op == "Concat" else {}
        if op == "Conv":
            channels = 2 * CHANNELS if inputs[0] == "both" else CHANNELS
            kernel = generator.normal(0, 0.3, (CHANNELS, channels, 3, 3)).astype(np.float32)
            constants.append(numpy_helper.from_array(kernel, f"{output}.weight"))
            constants.append(
                numpy_helper.from_array(generator.normal(0, 0.2, CHANNELS).astype(np.float32), f"{output}.bias")
            )
            inputs = [*inputs, f"{output}.weight", f"{output}.bias"]
        made.append(helper.make_node(op, inputs, [output], output, **attributes))
    declare = helper.make_tensor_value_info
    x = declare("x", TensorProto.FLOAT, ["n", CHANNELS, 8, 8])
    graph = helper.make_graph(
        made, "g", [x], [declare(o, TensorProto.FLOAT, ["n", CHANNELS, 8, 8]) for o in outputs], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


BRANCHED = [
    ("Conv", ["x"], "c1"), ("Relu", ["c1"], "r1"), ("Conv", ["r1"], "c2"), ("Relu", ["c2"], "r2"),
    ("Conv", ["r2"], "c3"), ("Relu", ["c3"], "r3"),
    ("Conv", ["r2"], "c4"), ("Sigmoid", ["c4"], "s4"),
    ("Concat", ["r3", "s4"], "both"), ("Conv", ["both"], "c5"),
]  # fmt: skip


def names(model: onnx.ModelProto, weights: set[str] | None = None) -> list[list[str]]:
    return [[conv.name for conv in chain.convs] for chain in find_chains(model, weights)]


def test_a_chain_ends_where_something_else_reads_or_no_relu_stands() -> None:
    assert names(graph_of(BRANCHED, ["c5"])) == [["c1", "c2"], ["c3"], ["c4"], ["c5"]]
    assert names(graph_of(BRANCHED[:6], ["r3"])) == [["c1", "c2", "c3"]]
    assert names(graph_of(BRANCHED[:6], ["r1", "r3"])) == [["c1"], ["c2", "c3"]]
    assert names(graph_of(BRANCHED[:6], ["r3"]), {"c2.weight", "c3.weight"}) == [["c2", "c3"]]


def test_a_relu_is_not_part_of_a_convolution_that_others_read_as_well() -> None:
    (chain,) = find_chains(graph_of(BRANCHED[:2], ["c1", "r1"]), None)
    assert (chain.y, chain.has_output_scale) == ("c1", False)


def test_paddings_of_two_sides_are_left_out() -> None:
    model = graph_of(BRANCHED[:2], ["r1"])
    model.graph.node[0].attribute[0].ints[:] = [0, 0, 1, 1]
    assert find_chains(model, None) == ()


@pytest.mark.parametrize(("tensor", "expected"), [("r1", True), ("c1", False), ("both", True), ("x", False)])
def test_what_holds_nothing_negative_is_read_from_the_graph(tensor, expected) -> None:
    assert is_nonnegative(tensor, GraphReaders(graph_of(BRANCHED, ["c5"]).graph)) is expected


def quantize_all(model: onnx.ModelProto, x: np.ndarray) -> list[QuantizedChain]:
    constants = {item.name: item for item in model.graph.initializer}
    done: list[QuantizedChain] = []
    for number, chain in enumerate(find_chains(model, None)):
        streams = []
        for graph in (model, insert_chains(model, done)):
            values = x if chain.x == "x" else GraphSession(prune(graph, chain.x)).run({"x": x})[chain.x]
            streams.append(torch.from_numpy(values))
        blocks = to_blocks(chain, constants)
        scale = input_scale(chain.x, done)
        done.append(quantize_chain(chain, blocks, Streams(*streams), Recipe("test"), number, scale))
    return done


def test_a_quantized_graph_computes_nearly_the_same_with_one_pair_per_tensor() -> None:
    model = graph_of(BRANCHED, ["c5", "r2"])
    x = np.random.default_rng(1).normal(0, 1, (64, CHANNELS, 8, 8)).astype(np.float32)
    done = quantize_all(model, x)
    quantized = insert_chains(model, done)
    ops = [node.op_type for node in quantized.graph.node]
    # x, r1, r2, r3 and both: r2 is read by two chains and is an output, and has one pair.
    assert ops.count("QuantizeLinear") == 5
    zeros = {i.name: i.data_type for i in quantized.graph.initializer if i.name.endswith(".zero_point")}
    assert {name for name, kind in zeros.items() if kind == TensorProto.INT8} == {"x.zero_point"}
    expected, given = (GraphSession(graph).run({"x": x}) for graph in (model, quantized))
    for name, values in expected.items():
        assert np.linalg.norm(given[name] - values) / np.linalg.norm(values) < 0.05


def test_integers_on_any_cpu_and_biases_in_units_of_the_sums() -> None:
    model = graph_of(BRANCHED[:6], ["r3"])
    x = np.random.default_rng(1).normal(0, 1, (64, CHANNELS, 8, 8)).astype(np.float32)
    done = quantize_all(model, x)
    quantized = insert_chains(model, done)
    assert all(largest_pair_sum(layer.weight) <= INT16_MAX for chain in done for layer in chain.layers)
    fast, slow = (GraphSession(quantized, optimized=optimized).run({"x": x})["r3"] for optimized in (True, False))
    # Only ties fall to either side: a step of the last pair, seldom.
    assert (np.abs(fast - slow) > 1e-6).mean() < 1e-3
