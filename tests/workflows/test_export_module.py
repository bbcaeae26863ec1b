"""`export_module`: whole networks with RepVGG blocks, in every precision, each output held against the float net."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.foreign_blocks import YoloRepConv
from helpers.progress import Heard
from helpers.quantized_nets import QUICK_RECIPE
from helpers.whole_networks import Extractor, PyramidNet, ThreeHeads, repvgg_block
from helpers.wide_statistics import randomize
from onnxruntime import InferenceSession, SessionOptions
from torch import Tensor, nn

from repvgg_deploy import DeployError, ModuleExportResult, export_module
from repvgg_deploy.errors import FusionError, GraphError
from repvgg_deploy.hardware.gpus import find_gpus
from repvgg_deploy.runtime.session import GraphSession

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None, reason="onnxscript, which torch's exporter needs, is not installed"
)
RTX = "tensorrt-rtx" if importlib.util.find_spec("tensorrt_rtx") else "none"
INT8_ERROR = 5e-2


def images(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def calibration(size: int = 32) -> list[Tensor]:
    return [images(8, size, seed) for seed in range(4)]


def export_int8(net: nn.Module, path: Path, engine: str = RTX, **options) -> ModuleExportResult:
    how = {"precision": "int8", "calibration": calibration(), "recipe": QUICK_RECIPE, "engine": engine}
    return export_module(net, images(1), path, **how, **options)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> ModuleExportResult:
    """An extractor of features in INT8."""
    return export_int8(randomize(Extractor()), tmp_path_factory.mktemp("extractor") / "net.onnx")


def integer_convolutions(path: Path) -> int:
    """How many convolutions ONNX Runtime runs in integers."""
    options = SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 4
    InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return ops.count("QLinearConv")


@pytest.mark.slow
def test_a_segmentation_net_becomes_a_verified_graph_and_an_engine(tmp_path) -> None:
    net = randomize(PyramidNet())
    result = export_module(net, images(1, 64), tmp_path / "net.onnx", engine=RTX)
    assert result.blocks == ("stem.0", "stem.1", "body.0", "body.1", "body.2", "body.3")
    assert result.parity["fused"]["output"].relative < 1e-12
    assert result.parity["onnx"]["output"].relative < 1e-5
    assert "BatchNormalization" not in result.ops
    x = images(3, 64, seed=5)
    given = GraphSession(result.onnx).run({"images": x.numpy()})["output"]
    with torch.no_grad():
        assert np.allclose(given, net(x).numpy(), rtol=1e-3, atol=1e-4)
    if RTX != "none":
        assert result.engine is not None
        assert (tmp_path / "net.plan").stat().st_size > 0
        assert result.engine.side.profile == (1, 2, 16)


@pytest.mark.slow
def test_half_precision_keeps_the_types_of_inputs_and_outputs(tmp_path) -> None:
    result = export_module(randomize(PyramidNet()), images(1, 64), tmp_path / "net.onnx", precision="fp16", engine=RTX)
    assert 1e-5 < result.parity["onnx"]["output"].relative < 3e-3
    graph = onnx.load(result.onnx).graph
    assert {item.type.tensor_type.elem_type for item in [*graph.input, *graph.output]} == {onnx.TensorProto.FLOAT}
    weights = {item.data_type for item in graph.initializer if len(item.dims) == 4}
    assert weights == {onnx.TensorProto.FLOAT16}
    assert RTX == "none" or result.engine.side.convolutions == {"fp16": 10}


@pytest.mark.slow
def test_the_chains_of_a_detector_are_quantized_and_run_in_integers(tmp_path) -> None:
    result = export_int8(randomize(ThreeHeads()), tmp_path / "net.onnx")
    assert result.outputs == ("level2", "level1", "level0")
    # Within each stage one chain; the block that all levels share is one for each of them.
    assert [len(chain.layers) for chain in result.chains] == [3, 2, 3, 1, 1]
    assert all(parity.relative < INT8_ERROR for parity in result.parity["quantized"].values())
    assert all(parity.relative < 1e-2 for parity in result.parity["onnx"].values())
    assert integer_convolutions(result.onnx) == 10
    assert RTX == "none" or result.engine.side.convolutions["int8"] == 10


@pytest.mark.slow
def test_outputs_that_later_stages_read_are_quantized_once(extractor) -> None:
    assert extractor.outputs == ("output_0", "output_1", "output_2")
    assert integer_convolutions(extractor.onnx) == 3
    assert all(parity.relative < INT8_ERROR for parity in extractor.parity["quantized"].values())


@pytest.mark.slow
def test_all_convolutions_are_quantized_where_that_is_asked_for(tmp_path) -> None:
    net = randomize(nn.Sequential(repvgg_block(3, 8, 2), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)))
    blocks = export_int8(net, tmp_path / "blocks.onnx", engine="none")
    everything = export_int8(net, tmp_path / "all.onnx", int8_layers="convolutions")
    assert [len(chain.layers) for chain in blocks.chains] == [1]
    assert [len(chain.layers) for chain in everything.chains] == [3]


@pytest.mark.slow
def test_what_another_activation_reads_is_left_exact(tmp_path) -> None:
    net = randomize(nn.Sequential(repvgg_block(3, 8), YoloRepConv(8, 8), YoloRepConv(8, 8)))
    result = export_int8(net, tmp_path / "net.onnx")
    assert len(result.chains) == 2
    assert result.ops["QuantizeLinear"] == 3
    assert result.parity["quantized"]["output"].relative < INT8_ERROR


@pytest.mark.slow
def test_height_and_width_may_be_dynamic(tmp_path) -> None:
    net = randomize(ThreeHeads())
    result = export_module(
        net, images(1), tmp_path / "net.onnx", dynamic=("batch", "height", "width"), engine=RTX, input_names=["pixels"]
    )
    x = images(1, 64)[:, :, :48]
    given = GraphSession(result.onnx).run({"pixels": x.numpy()})
    with torch.no_grad():
        expected = net(x)
    assert all(np.allclose(given[name], expected[name].numpy(), rtol=1e-3, atol=1e-4) for name in expected)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = repvgg_block(3, 4, 2), repvgg_block(1, 4, 2)

    def forward(self, picture: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.left(picture), self.right(depth)
        return left + right, (left * right).mean((2, 3))


@pytest.mark.slow
def test_several_inputs_and_outputs(tmp_path) -> None:
    net = randomize(TwoInputs())
    examples = [(images(4, seed=s), images(4, seed=s + 50)[:, :1]) for s in range(8)]
    how = {"precision": "int8", "calibration": examples, "recipe": QUICK_RECIPE, "engine": RTX}
    result = export_module(net, examples[0], tmp_path / "net.onnx", output_names=["sum", "means"], **how)
    assert (result.inputs, result.outputs) == (("picture", "depth"), ("sum", "means"))
    assert len(result.chains) == 2


@pytest.mark.slow
@pytest.mark.skipif(RTX == "none", reason="TensorRT-RTX is not installed")
@pytest.mark.skipif(bool(find_gpus().gpus), reason="this machine has a GPU")
def test_what_was_built_and_not_run_is_said(tmp_path) -> None:
    heard = Heard()
    result = export_module(randomize(Extractor()), images(1), tmp_path / "one.onnx", engine=RTX, progress=heard)
    assert "engine" not in result.parity
    assert f"note: the engine was built but not run: {find_gpus().reason}" in heard.notes
    two = (images(1), images(1)[:, :1])
    export_module(randomize(TwoInputs()), two, tmp_path / "two.onnx", engine=RTX, progress=heard)
    assert heard.notes[-1] == (
        "note: the engine was built but not run: it has several inputs, or inputs of several sizes"
    )


@pytest.mark.slow
def test_the_same_module_gives_the_same_bytes(extractor, tmp_path) -> None:
    again = export_int8(randomize(Extractor()), tmp_path / "net.onnx", engine="none")
    assert again.onnx.read_bytes() == extractor.onnx.read_bytes()


@pytest.mark.slow
def test_the_graph_says_where_it_comes_from_and_nothing_of_this_machine(extractor) -> None:
    properties = {item.key: item.value for item in onnx.load(extractor.onnx).metadata_props}
    assert properties["repvgg_deploy.arch"] == "Extractor"
    assert properties["repvgg_deploy.sha256"] == extractor.sha256
    assert '"images": 32' in properties["repvgg_deploy.quantization"]
    assert b"site-packages" not in extractor.onnx.read_bytes()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = repvgg_block(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        y = self.block(images)
        return y if y.sum() > 0 else -y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"module": Branching()}, GraphError, "torch cannot export Branching"),
        ({"module": nn.Conv2d(3, 3, 3)}, FusionError, "no RepVGG block"),
        ({"precision": "int8"}, DeployError, "needs calibration"),
        ({"precision": "int8", "calibration": []}, DeployError, "no calibration examples"),
        ({"dynamic": ("depth",)}, DeployError, "not a dimension"),
        ({"input_names": ["a", "b"]}, DeployError, "2 input names for 1 inputs"),
        ({"output_names": ["a"]}, DeployError, "1 output names for 3 outputs"),
        ({"path": "net.pt"}, DeployError, "does not end in .onnx"),
        ({"engine": "tensorflow"}, DeployError, "tensorflow"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_what_is_wrong_and_write_nothing(change, error, said, tmp_path) -> None:
    options = {"module": randomize(Extractor()), "path": "net.onnx", **change}
    with pytest.raises(error, match=said):
        export_module(options.pop("module"), images(1), tmp_path / options.pop("path"), **options)
    assert list(tmp_path.iterdir()) == []


class FixedSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = repvgg_block(3, 4, 2), nn.Linear(4 * 16 * 16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(images).flatten(1))


def test_dimensions_that_the_module_fixes_are_refused_by_name(tmp_path) -> None:
    with pytest.raises(DeployError, match=r"FixedSize does not run on inputs of another size: images 1x3x64x32"):
        export_module(randomize(FixedSize()), images(1), tmp_path / "net.onnx", dynamic=("height",))


@pytest.mark.exhaustive
def test_a_feature_extractor_of_timm(timm, tmp_path) -> None:
    torch.manual_seed(0)
    net = randomize(timm.create_model("repvgg_a0", features_only=True, out_indices=(0, 1, 2)))
    result = export_int8(net, tmp_path / "net.onnx")
    assert len(result.outputs) == 3
    assert all(parity.relative < 0.2 for parity in result.parity["quantized"].values())
