"""INT8 graphs on CPUs whose kernels add two products in 16 bits: whether this is one, and which layers it harms.

See `repvgg_deploy.quantization.pair_sums`. The graphs that this project makes are safe on every CPU; those of other
tools are often not.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.errors import GraphError
from repvgg_deploy.files.staging import scratch_folder
from repvgg_deploy.graphs.reading import read_graph
from repvgg_deploy.runtime.failures import is_graph_failure

EXACT = ("session.x64quantprecision", "1")
"""ONNX Runtime's session option for kernels that add in 32 bits; about half as fast, without effect on other CPUs."""

# The operators that ONNX Runtime runs in integers, and which input is the weight.
_WEIGHTS = {
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
}
_QUANTIZED = {*_WEIGHTS, "QuantizeLinear", "DynamicQuantizeLinear"}


@lru_cache(maxsize=1)
def saturates_here() -> bool:
    """Whether ONNX Runtime's integer kernels saturate on this CPU: tried with one product, not read from its name.

    Raises:
        DeployError: ONNX Runtime is not installed.
    """
    from repvgg_deploy.runtime.onnxruntime import import_onnxruntime

    runtime = import_onnxruntime()
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "y"], ["z"])],
        "two_products",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [4, 4])],
        [helper.make_tensor_value_info("z", TensorProto.INT32, [4, 16])],
        [numpy_helper.from_array(np.full((4, 16), 127, np.int8), "y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.full((4, 4), 255, np.uint8)})
    return bool((product != 4 * 255 * 127).any())


def has_integers(path: Path) -> bool:
    """Whether an ONNX graph quantizes anything."""
    try:
        skeleton = read_graph(path)
    except GraphError:
        # The code that opens the file to run it reports what is wrong with it.
        return False
    return any(node.op_type in _QUANTIZED for node in skeleton.graph.node)


def find_saturating_layers(path: Path) -> tuple[str, ...]:
    """The layers of an ONNX graph whose sums of two products may not fit 16 bits, as ONNX Runtime would run them.

    They are those that it runs in integers after its own optimizations; a layer whose weights are not constant is not
    looked at. Any graph may be given; most have none.
    """
    from repvgg_deploy.runtime.onnxruntime import import_onnxruntime

    if not has_integers(path):
        return ()
    runtime = import_onnxruntime()
    with scratch_folder() as scratch:
        optimized = scratch / "optimized.onnx"
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        # Integer operators are made up to here. The level above saves layouts of this machine, and warns of it.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
        try:
            runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if not is_graph_failure(error):
                raise
            return ()
        model = onnx.load(optimized)
    weights = {item.name: item for item in model.graph.initializer if item.data_type == TensorProto.INT8}
    return tuple(
        node.name or node.output[0]
        for node in model.graph.node
        if (name := _weight_name(node)) in weights and _may_saturate(node, numpy_helper.to_array(weights[name]))
    )


def _weight_name(node: onnx.NodeProto) -> str:
    index = _WEIGHTS.get(node.op_type)
    return "" if index is None or index >= len(node.input) else node.input[index]


def _may_saturate(node: onnx.NodeProto, weight: NDArray[Any]) -> bool:
    import torch

    from repvgg_deploy.quantization.pair_sums import INT16_MAX, largest_pair_sum

    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    if "Conv" not in node.op_type and not transposed:
        # Of a product (…, columns, filters), every filter's own columns are neighbours.
        weight = np.swapaxes(weight, -1, -2).reshape(-1, weight.shape[-2])
    # A convolution over one dimension or three has taps as one over two.
    rows = weight.reshape(*weight.shape[:2], -1)
    return rows.size > 0 and largest_pair_sum(torch.from_numpy(rows.copy())) > INT16_MAX
