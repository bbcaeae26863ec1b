"""The Q/DQ graph: where its pairs stand, its types and size, and that ONNX Runtime computes what torch does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.quantized_nets import QUICK, SHAPES, draw_images, fused_net

from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import OnnxGraph, write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.quantization import QuantizedNet, quantize
from repvgg_deploy.quantization.points import fused_blocks
from repvgg_deploy.quantization.qdq import as_tensorrt_reads, to_qdq_onnx, with_fp16_scales

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
OPTIONS = GraphOptions(32, 32)


@pytest.fixture(scope="module", params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def quantized(shape: str) -> QuantizedNet:
    return quantize(fused_net(shape), [draw_images(64)], QUICK)


def run(model: onnx.ModelProto, images: torch.Tensor, optimized: Path | None = None) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"images": images.numpy()}))


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def bias_of(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """The bias of a Conv or Gemm, which may be added by a node of its own."""
    if len(node.input) == 3:
        return node.input[2]
    (add,) = (reader for reader in model.graph.node if node.output[0] in reader.input)
    assert add.op_type == "Add"
    return add.input[1]


@pytest.mark.slow
def test_pairs_stand_in_front_of_every_convolution_the_pool_and_the_classifier(quantized: QuantizedNet) -> None:
    model = to_qdq_onnx(quantized, OPTIONS, {}).to_proto()
    made = producers(model)
    weights = {item.name: item for item in model.graph.initializer}
    checked = 0
    for node in model.graph.node:
        pooled = node.op_type == "GlobalAveragePool" and node.name == "pool"
        squeeze = ".se_" in node.name
        if squeeze or not (pooled or node.op_type in ("Conv", "Gemm")):
            continue
        dequantize = made[node.input[0]]
        # A Flatten may stand between the classifier and its pair.
        while dequantize.op_type == "Flatten":
            dequantize = made[dequantize.input[0]]
        assert dequantize.op_type == "DequantizeLinear", node.name
        assert made[dequantize.input[0]].op_type == "QuantizeLinear"
        assert weights[dequantize.input[1]].dims == []
        zero = weights[dequantize.input[2]]
        assert onnx.numpy_helper.to_array(zero).item() == 0
        # Only the images have negative values.
        stem = node.name == "stages.0.0.conv"
        assert zero.data_type == (onnx.TensorProto.INT8 if stem else onnx.TensorProto.UINT8)
        if not pooled:
            kernel = made[node.input[1]]
            assert kernel.op_type == "DequantizeLinear"
            assert weights[kernel.input[0]].data_type == onnx.TensorProto.INT8
            assert list(weights[kernel.input[1]].dims) == [weights[kernel.input[0]].dims[0]]
            assert kernel.attribute[0].i == 0
            assert weights[bias_of(model, node)].data_type == onnx.TensorProto.FLOAT
        checked += 1
    assert checked == len(quantized.integers()) + 1


@pytest.mark.slow
def test_no_pair_stands_between_a_convolution_and_its_relu(quantized: QuantizedNet, shape: str) -> None:
    model = to_qdq_onnx(quantized, OPTIONS, {}).to_proto()
    made = producers(model)
    before = {
        made[node.input[0]].op_type for node in model.graph.node if node.op_type == "Relu" and ".se_" not in node.name
    }
    assert before == {"Mul" if shape == "se before" else "Conv"}


def agreeing_share(model: onnx.ModelProto, net: QuantizedNet, images: torch.Tensor) -> float:
    """Of all activations, the share that has the same integer in ONNX Runtime and in torch."""
    points = net.point_integers(images)
    zeros = {node.output[0]: node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    types = {item.name: item.data_type for item in model.graph.initializer}
    first, *others = points
    equal = []
    # ONNX Runtime keeps a convolution in float whose int8 input is an output of the graph: so that one by itself.
    for names in ([first], others):
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        for name in (f"{point}.input.quantized" for point in names):
            watched.graph.output.append(onnx.helper.make_tensor_value_info(name, types[zeros[name]], None))
        _, *integers = run(watched, images)
        equal += [seen.ravel() == points[point].numpy().ravel() for point, seen in zip(names, integers, strict=True)]
    return float(np.concatenate(equal).mean())


def least_share(net: QuantizedNet) -> float:
    """What `agreeing_share` must be: all of it where every layer is an integer one.

    In front of a squeeze-excite a convolution is a float one in ONNX Runtime, whose sums are ordered in another way
    than torch's: a value on the border between two steps may then round to either side.
    """
    plain = all(isinstance(block.se_before, torch.nn.Identity) for _, block in fused_blocks(net.float_net))
    plain = plain and all(isinstance(block.se_after, torch.nn.Identity) for _, block in fused_blocks(net.float_net))
    return 1.0 if plain else 0.999


@pytest.mark.slow
def test_onnx_runtime_computes_the_integers_of_the_torch_net(quantized: QuantizedNet) -> None:
    # Twice as strong as any image of the calibration, so that much lies beyond the clipping thresholds.
    images = draw_images(32, seed=11) * 2
    model = to_qdq_onnx(quantized, OPTIONS, {}).to_proto()
    (logits,) = run(model, images)
    np.testing.assert_allclose(logits, quantized(images), atol=0.03 * float(quantized(images).abs().max()))
    assert agreeing_share(model, quantized, images) >= least_share(quantized)


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "value"), [(0.0, 0.0), (0.0, 0.5), (1e-7, 0.5), (1e-6, 0.5)])
def test_onnx_runtime_computes_the_integers_of_filters_that_are_nearly_zero(factor: float, value: float) -> None:
    """Such a filter's bias is many units of its sums, and ONNX Runtime holds it as int32."""
    net, images = fused_net(), draw_images(32, seed=11)
    block = dict(fused_blocks(net))["stages.2.0"]
    assert block.conv.bias is not None
    block.conv.weight[0] *= factor
    block.conv.bias[0] = value
    rounded = quantize(net, [draw_images(64)], QUICK)
    model = to_qdq_onnx(rounded, OPTIONS, {}).to_proto()
    assert agreeing_share(model, rounded, images) == 1.0
    # Nothing but such filters pays for it.
    exact = net(images)
    assert float((rounded(images) - exact).norm() / exact.norm()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.0, 0.03])
def test_small_filters_keep_their_bias_in_float16(factor: float) -> None:
    """ONNX Runtime casts a float16 bias in units of the sums to float16, which ends at 65,504."""
    net, images = fused_net(), draw_images(32, seed=11)
    block = dict(fused_blocks(net))["stages.3.0"]
    assert block.conv.bias is not None
    block.conv.weight[0] *= factor
    block.conv.bias[0] = 0.7
    rounded = quantize(net, [draw_images(64)], QUICK)
    (logits,) = run(to_qdq_onnx(rounded, OPTIONS, {}, np.dtype(np.float16)).to_proto(), images)
    exact, half = net(images), with_fp16_scales(rounded)(images)
    # Float16 arithmetic turns some integers: 0.03 for any net.
    assert float((torch.from_numpy(logits).float() - half).norm() / half.norm()) < 0.05
    # The larger scales of such filters cost next to nothing.
    assert float((half - exact).norm()) < 1.1 * float((rounded(images) - exact).norm())


def test_the_graph_as_tensorrt_reads_it_gives_the_integers_of_as_tensorrt(quantized: QuantizedNet) -> None:
    # Twice as strong as any image of the calibration, so that much lies beyond the clipping thresholds.
    images = draw_images(32, seed=11) * 2
    model = as_tensorrt_reads(to_qdq_onnx(quantized, OPTIONS, {}).to_proto())
    engine = quantized.as_tensorrt()
    assert float(max(v.max() for v in engine.point_integers(images).values())) == 127
    assert float(max(v.max() for v in quantized.point_integers(images).values())) > 127
    assert agreeing_share(model, engine, images) >= 0.999
    assert agreeing_share(to_qdq_onnx(quantized, OPTIONS, {}).to_proto(), engine, images) < 0.999


def test_a_file_with_int8_zero_points_has_the_same_integers(quantized: QuantizedNet) -> None:
    """It is the usual file node for node and weight for weight, but for the type of the zero-points behind a ReLU."""
    usual, old = (
        to_qdq_onnx(quantized, OPTIONS, {}, activation_type=activation_type).to_proto()
        for activation_type in ("uint8", "int8")
    )
    assert list(usual.graph.node) == list(old.graph.node)
    changed = [a.name for a, b in zip(usual.graph.initializer, old.graph.initializer, strict=True) if a != b]
    unsigned = {f"{point}.input.zero_point" for point in quantized.unsigned if point not in ("pool", "classifier")}
    assert unsigned <= set(changed)
    assert all(name.endswith(".zero_point") for name in changed)
    assert as_tensorrt_reads(usual) == old
    assert agreeing_share(old, quantized.as_tensorrt(), draw_images(16, seed=11) * 2) >= 0.999


@pytest.mark.slow
def test_onnx_runtime_makes_every_layer_an_integer_one(tmp_path: Path) -> None:
    quantized = quantize(fused_net("grouped"), [draw_images(32)], QUICK)
    model = to_qdq_onnx(quantized, OPTIONS, {}).to_proto()
    images = draw_images(16, seed=2)
    (logits,) = run(model, images, tmp_path / "optimized.onnx")
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert ops["QLinearConv"] == len(quantized.integers()) - 1
    assert ops["Relu"] == 0
    assert ops["QGemm"] == ops["QLinearGlobalAveragePool"] == 1
    assert ops["Conv"] == ops["FusedConv"] == ops["Gemm"] == ops["DequantizeLinear"] == 0
    np.testing.assert_allclose(logits, quantized(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_layers_kept_float_have_float_weights_and_no_pair() -> None:
    quantized = quantize(fused_net(), [draw_images(32)], QUICK, keep_float=["stages.3.1", "classifier"])
    model = to_qdq_onnx(quantized, OPTIONS, {}).to_proto()
    made = producers(model)
    conv = next(node for node in model.graph.node if node.name == "stages.3.1.conv")
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    assert made[conv.input[0]].op_type == "Relu"
    assert conv.input[1] not in made
    assert gemm.input[1] not in made
    images = draw_images(8, seed=2)
    np.testing.assert_allclose(run(model, images)[0], quantized(images), rtol=1e-3, atol=1e-3)


def size_of(graph: OnnxGraph, path: Path) -> int:
    write_graph(graph, path)
    return path.stat().st_size


def test_the_weights_take_a_quarter_of_the_space(quantized: QuantizedNet) -> None:
    graph = to_qdq_onnx(quantized, OPTIONS, {})
    kernels = sum(layer.weight.numel() for layer in quantized.integers().values())
    assert sum(a.nbytes for a in graph.weights.values() if a.dtype == np.int8 and a.ndim > 1) == kernels
    full = to_onnx(quantized.float_net, FloatLayers(), OPTIONS, {})
    assert graph.weight_bytes < 0.45 * full.weight_bytes


def test_float16_scales_need_opset_19_and_give_nearly_the_same_answer(quantized: QuantizedNet) -> None:
    half = np.dtype(np.float16)
    with pytest.raises(GraphError, match="float16 scales"):
        to_qdq_onnx(quantized, GraphOptions(32, 32, opset=17), {}, half)
    model = to_qdq_onnx(quantized, OPTIONS, {}, half).to_proto()
    images = draw_images(16, seed=2)
    expected = with_fp16_scales(quantized)(images).numpy()
    (logits,) = run(model, images)
    assert np.linalg.norm(logits - expected) < 0.05 * np.linalg.norm(expected)


def test_the_same_net_gives_the_same_file(quantized: QuantizedNet, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        write_graph(to_qdq_onnx(quantized, OPTIONS, {"k": "v"}), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
