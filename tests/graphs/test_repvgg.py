"""The graph that is exported: its operators, its inputs and outputs, its bytes."""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.float32_sums import error_of_float32_sums
from helpers.small_nets import logits_of, relative
from helpers.wide_statistics import narrow, randomize
from onnx import TensorProto

from repvgg_deploy.artifacts import Precision, Preprocessing, Provenance
from repvgg_deploy.errors import GraphError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.metadata import make_metadata, read_metadata
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.nets.cards import load_cards
from repvgg_deploy.nets.repvgg import RepVGG

OPTIONS = GraphOptions(height=32, width=32)
PREPROCESSING = Preprocessing(32, 32, 32)


def fused_net(name: str = "A0", classes: int = 7, channels: int = 3) -> RepVGG:
    torch.manual_seed(0)
    return fuse(randomize(RepVGG(narrow(name).spec(classes, channels))))


def half() -> FloatLayers:
    return FloatLayers(np.dtype(np.float16))


def run(path, images) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})


def written(tmp_path, net, options=OPTIONS, layers=None, metadata=None):
    path = tmp_path / "net.onnx"
    write_graph(to_onnx(net, layers or FloatLayers(), options, metadata or {}), path)
    return path


PLAIN = {"Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"}


@pytest.mark.parametrize("name", list(load_cards()))
@pytest.mark.slow
def test_the_graph_has_just_the_operators_of_the_architecture(name) -> None:
    net = fused_net(name)
    graph = to_onnx(net, FloatLayers(), OPTIONS, {})
    blocks = len(net.spec.blocks)
    expected = {"Conv": blocks, "Relu": blocks, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    if any(block.squeeze_excite for block in net.spec.blocks):
        expected |= {"Conv": 3 * blocks, "Relu": 2 * blocks, "GlobalAveragePool": 1 + blocks}
        expected |= {"Sigmoid": blocks, "Mul": blocks}
    assert graph.op_histogram() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A0", "B1g4", "D2se", "L2pse"])
def test_onnx_runtime_gives_the_fused_nets_logits_at_any_batch(name, tmp_path) -> None:
    net = fused_net(name)
    path = written(tmp_path, net)
    wide = copy.deepcopy(net).double()
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        logits = torch.from_numpy(run(path, images.numpy())[0])
        assert logits.shape == (batch, 7)
        assert relative(logits, logits_of(net, images)) <= 2 * error_of_float32_sums(wide, images)


@pytest.mark.slow
def test_the_file_passes_the_full_checker_and_declares_the_contract(tmp_path) -> None:
    path = written(tmp_path, fused_net())
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert [i.name for i in model.graph.input] == ["images"]
    assert [o.name for o in model.graph.output] == ["logits"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, 32, 32]
    assert model.opset_import[0].version == 19
    assert {op.domain for op in model.opset_import} == {""}


def test_a_fixed_batch_is_in_the_shape(tmp_path) -> None:
    model = onnx.load(written(tmp_path, fused_net(), replace(OPTIONS, batch=4)))
    for tensor in (model.graph.input[0], model.graph.output[0]):
        assert tensor.type.tensor_type.shape.dim[0].dim_value == 4


@pytest.mark.parametrize("opset", [13, 16, 17, 18, 19, 20, 21])
def test_every_opset_from_13_runs(opset, tmp_path) -> None:
    path = written(tmp_path, fused_net(), replace(OPTIONS, opset=opset, topk=2, softmax=True))
    assert onnx.load(path).opset_import[0].version == opset
    scores, classes = run(path, np.zeros((2, 3, 32, 32), np.float32))
    assert scores.shape == classes.shape == (2, 2)


@pytest.mark.parametrize("opset", [12, 99])
def test_an_opset_out_of_range_is_refused(opset) -> None:
    with pytest.raises(GraphError, match=f"opset {opset}"):
        to_onnx(fused_net(), FloatLayers(), replace(OPTIONS, opset=opset), {})


def test_the_same_net_gives_the_same_bytes(tmp_path) -> None:
    metadata = {"b": "2", "a": "1"}
    first = written(tmp_path, fused_net(), metadata=metadata).read_bytes()
    second = written(tmp_path, fused_net(), metadata=dict(reversed(metadata.items()))).read_bytes()
    assert first == second


def test_the_streamed_file_is_the_protobuf_that_onnx_would_write(tmp_path) -> None:
    graph = to_onnx(fused_net(), FloatLayers(), OPTIONS, {"key": "value"})
    write_graph(graph, tmp_path / "streamed.onnx")
    streamed = onnx.load(tmp_path / "streamed.onnx")
    assert streamed.SerializeToString(deterministic=True) == graph.to_proto().SerializeToString(deterministic=True)


def test_weights_beyond_the_protobuf_limit_go_to_a_file_of_their_own(tmp_path) -> None:
    net = fused_net()
    graph = to_onnx(net, FloatLayers(), OPTIONS, {})
    write_graph(graph, tmp_path / "inline.onnx")
    write_graph(graph, tmp_path / "external.onnx", external_above=1000)
    assert (tmp_path / "external.onnx.data").stat().st_size >= graph.weight_bytes
    assert (tmp_path / "external.onnx").stat().st_size < 100_000
    onnx.checker.check_model(str(tmp_path / "external.onnx"), full_check=True)
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    assert np.array_equal(run(tmp_path / "inline.onnx", images)[0], run(tmp_path / "external.onnx", images)[0])


def test_an_fp16_graph_holds_nothing_but_fp16_weights_and_float32_io(tmp_path) -> None:
    net = fused_net()
    path = written(tmp_path, net, layers=half())
    model = onnx.load(path)
    assert {w.data_type for w in model.graph.initializer} == {TensorProto.FLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert [n.op_type for n in model.graph.node].count("Cast") == 2
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = net(images).numpy()
    assert np.linalg.norm(run(path, images.numpy())[0] - expected) < 1e-2 * np.linalg.norm(expected)


def test_fp16_io_needs_no_cast(tmp_path) -> None:
    path = written(tmp_path, fused_net(), replace(OPTIONS, io=Precision.FP16), half())
    assert "Cast" not in {n.op_type for n in onnx.load(path).graph.node}
    assert run(path, np.zeros((1, 3, 32, 32), np.float16))[0].dtype == np.float16


def test_what_fp16_loses_is_counted() -> None:
    net = fused_net()
    weight = net.stages[1][0].conv.weight.data
    weight.view(-1)[:5] = torch.tensor([1e-9, -1e-9, 3e-6, 0.0, 1.0])
    expected_zero, expected_subnormal = 0, 0
    for value in net.parameters():
        size = value.detach().abs()
        rounded = value.detach().half()
        expected_zero += int(((rounded == 0) & (size > 0)).sum())
        expected_subnormal += int(((rounded != 0) & (size < 2**-14)).sum())
    layers = half()
    to_onnx(net, layers, OPTIONS, {})
    assert layers.rounding.flushed_to_zero == expected_zero >= 2
    assert layers.rounding.subnormal == expected_subnormal >= 1
    assert layers.rounding.values == sum(p.numel() for p in net.parameters())


def test_a_weight_beyond_fp16_fails_with_its_name() -> None:
    net = fused_net()
    net.stages[2][1].conv.bias.data[0] = 7e4
    with pytest.raises(GraphError, match=r"stages.2.1.conv.bias reaches 7e\+04"):
        to_onnx(net, half(), OPTIONS, {})


@pytest.mark.parametrize("layers", [FloatLayers, half], ids=["fp32", "fp16"])
def test_uint8_input_is_exact_at_the_borders_too(layers, tmp_path) -> None:
    """A mean far from zero would show zero padding that acts on pixels instead of on normalized values."""
    net = fused_net()
    far = Preprocessing(32, 32, 32, mean=(0.9, 0.1, 0.5), std=(0.1, 0.3, 0.2))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    as_pixels = run(written(tmp_path, net, replace(OPTIONS, uint8_input=far), layers()), pixels)[0]
    as_floats = run(written(tmp_path, net, OPTIONS, layers()), normalize(pixels, far))[0]
    assert np.linalg.norm(as_pixels - as_floats) <= 1e-6 * np.linalg.norm(as_floats)


def test_uint8_input_normalizes_in_float32_before_the_first_convolution(tmp_path) -> None:
    model = onnx.load(written(tmp_path, fused_net(), replace(OPTIONS, uint8_input=PREPROCESSING), half()))
    assert [n.op_type for n in model.graph.node][:6] == ["Cast", "Transpose", "Mul", "Add", "Cast", "Conv"]
    shape = model.graph.input[0].type.tensor_type
    assert shape.elem_type == TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in shape.shape.dim] == ["batch", 32, 32, 3]


def test_softmax_gives_probabilities(tmp_path) -> None:
    net, images = fused_net(), torch.randn(3, 3, 32, 32)
    path = written(tmp_path, net, replace(OPTIONS, softmax=True))
    assert onnx.load(path).graph.output[0].name == "probabilities"
    with torch.no_grad():
        assert np.allclose(run(path, images.numpy())[0], net(images).softmax(1).numpy(), atol=1e-6)


@pytest.mark.parametrize("softmax", [False, True])
def test_topk_gives_the_best_scores_and_classes(softmax, tmp_path) -> None:
    net, images = fused_net(), torch.randn(3, 3, 32, 32)
    path = written(tmp_path, net, replace(OPTIONS, topk=3, softmax=softmax))
    with torch.no_grad():
        logits = net(images)
    expected = (logits.softmax(1) if softmax else logits).topk(3)
    scores, classes = run(path, images.numpy())
    assert [o.name for o in onnx.load(path).graph.output] == ["scores", "classes"]
    assert np.array_equal(classes, expected.indices.numpy())
    assert np.allclose(scores, expected.values.numpy(), rtol=1e-4)


def test_more_than_all_classes_is_refused() -> None:
    with pytest.raises(GraphError, match="--topk 8 is out of range"):
        to_onnx(fused_net(), FloatLayers(), replace(OPTIONS, topk=8), {})


def test_other_input_channels_need_their_own_mean_for_uint8(tmp_path) -> None:
    net = fused_net(channels=4)
    with pytest.raises(GraphError, match="4 channels"):
        to_onnx(net, FloatLayers(), replace(OPTIONS, uint8_input=PREPROCESSING), {})
    four = Preprocessing(32, 32, 32, (0.5,) * 4, (0.25,) * 4)
    path = written(tmp_path, net, replace(OPTIONS, uint8_input=four))
    assert run(path, np.zeros((1, 32, 32, 4), np.uint8))[0].shape == (1, 7)


def test_metadata_comes_back_as_it_was_written(tmp_path) -> None:
    provenance = Provenance(
        "ab" * 32,
        "RepVGG-A0",
        "timm",
        "train",
        Precision.FP16,
        PREPROCESSING,
        ("tench", "Größe"),
        {"torch": "2"},
        {"k": [1]},
    )
    path = written(tmp_path, fused_net(), metadata=make_metadata(provenance))
    properties = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert read_metadata(properties) == provenance
    assert json.loads(properties["repvgg_deploy.class_names"]) == ["tench", "Größe"]


def test_a_graph_of_another_tool_has_no_provenance() -> None:
    assert read_metadata({"author": "somebody"}) is None


@pytest.mark.parametrize("damage", [{"precision": "int3"}, {"tools": "{"}, {"preprocessing": '{"height": 1}'}])
def test_damaged_metadata_are_named(damage) -> None:
    provenance = Provenance("ab", "RepVGG-A0", "timm", "train", Precision.FP32, PREPROCESSING, None)
    properties = make_metadata(provenance) | {f"repvgg_deploy.{key}": value for key, value in damage.items()}
    with pytest.raises(GraphError, match="metadata"):
        read_metadata(properties)
