"""Parts of the way from a torch module to a graph that need no export."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.graphs.torch_export import resolve_dynamic, sort_nodes, to_half

IMAGE, VECTOR = torch.zeros(1, 3, 8, 8), torch.zeros(1, 5)


def test_names_of_dimensions_apply_to_the_inputs_that_have_them() -> None:
    found = resolve_dynamic(("height", "batch"), ("image", "vector"), (IMAGE, VECTOR))
    assert found == {"image": {0: "batch", 2: "height"}, "vector": {0: "batch"}}
    assert resolve_dynamic((), ("image",), (IMAGE,)) == {"image": {}}
    assert resolve_dynamic({"vector": {1: "length"}}, ("image", "vector"), (IMAGE, VECTOR)) == {"vector": {1: "length"}}


@pytest.mark.parametrize("dynamic", [("depth",), {"mask": {0: "batch"}}])
def test_unknown_dimensions_are_refused(dynamic) -> None:
    with pytest.raises(DeployError, match=r"depth|mask"):
        resolve_dynamic(dynamic, ("image",), (IMAGE,))


def test_nodes_are_put_in_an_order_in_which_they_can_run() -> None:
    nodes = [helper.make_node("Relu", [x], [y], y) for x, y in (("b", "c"), ("a", "b"), ("x", "a"), ("c", "d"))]
    assert [node.name for node in sort_nodes(nodes)] == ["a", "b", "c", "d"]
    in_order = [nodes[2], nodes[1], nodes[0]]
    assert sort_nodes(in_order) == in_order


def test_a_weight_beyond_half_precision_is_refused_by_name() -> None:
    declare = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.full(3, 7e4, np.float32), "gain")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "gain"], ["y"])],
        "g", [declare("x", TensorProto.FLOAT, [3])], [declare("y", TensorProto.FLOAT, [3])], [weight],
    )  # fmt: skip
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    with pytest.raises(GraphError, match="gain reaches 7e"):
        to_half(model)
