"""The nets to compare with: what the field calls ResNet and VGG, through the same export as a RepVGG."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from helpers.float32_sums import error_of_float32_sums
from helpers.small_nets import logits_of, randomize, relative

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.benchmark.baseline_graphs import BaselineFloats, BaselineIntegers, find_ranges, to_baseline_onnx
from repvgg_deploy.errors import DeployError
from repvgg_deploy.graphs.builder import OnnxGraph, write_graph
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.graphs.simplification import find_simplification
from repvgg_deploy.nets.baselines import build_baseline, fold_batch_norms
from repvgg_deploy.nets.cards import find_baseline, load_baselines, require_baseline
from repvgg_deploy.nets.resnet import ResNet, ResNetSpec
from repvgg_deploy.nets.seeding import seed_weights
from repvgg_deploy.nets.vgg import Vgg, VggSpec
from repvgg_deploy.runtime.onnxruntime import OnnxRunner, import_onnxruntime

# Parameters as torchvision's documentation has them.
PARAMETERS = {
    "ResNet-18": 11_689_512,
    "ResNet-34": 21_797_672,
    "ResNet-50": 25_557_032,
    "ResNet-101": 44_549_160,
    "VGG-16": 138_357_544,
}
SMALL = [
    ResNetSpec((1, 2, 1, 1), bottleneck=False, classes=7),
    ResNetSpec((1, 2, 1, 1), bottleneck=True, classes=7),
    VggSpec((1, 1, 1, 1, 1), size=64, classes=7, hidden=64),
]


@cache
def make(spec: ResNetSpec | VggSpec) -> ResNet | Vgg:
    """A net with seeded weights, which no test changes."""
    net = ResNet(spec) if isinstance(spec, ResNetSpec) else Vgg(spec)
    seed_weights(net, 3, size=64)
    return net


@cache
def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32)


@pytest.fixture
def pictures() -> np.ndarray:
    return noise()


@cache
def ranges(spec: ResNetSpec | VggSpec) -> dict[str, float]:
    """What the activations of `make(spec)` reach on the pictures."""
    return find_ranges(make(spec), noise())


@cache
def int8_graph(spec: ResNetSpec | VggSpec, for_engine: bool) -> OnnxGraph:
    return to_baseline_onnx(make(spec), BaselineIntegers(ranges(spec), for_engine), GraphOptions(64, 64), {})


@cache
def logits(spec: ResNetSpec | VggSpec) -> torch.Tensor:
    """Those of `make(spec)` for the pictures, in float64."""
    return logits_of(make(spec), torch.from_numpy(noise()))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_card_has_the_published_parameters_and_flops(name: str) -> None:
    card = load_baselines()[name]
    with torch.device("meta"):
        net = build_baseline(card)
        count = sum(parameter.numel() for parameter in net.parameters())
        macs = count_macs(net)
    assert count == PARAMETERS[name]
    assert count / 1e6 == pytest.approx(card.published.params_m, abs=5e-4)
    assert macs / 1e9 == pytest.approx(card.published.gflops, rel=2e-3)


def count_macs(net: torch.nn.Module) -> int:
    """By running it on the meta device, layer by layer: independent of the package's own counting."""
    total = 0

    def add(layer: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0].numel() * layer.weight[0].numel()

    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(add)
    net.eval()(torch.empty(1, 3, 224, 224))
    return total


@pytest.mark.slow
def test_timms_resnet50_loads_and_gives_equal_logits(timm: ModuleType) -> None:
    theirs = timm.create_model("resnet50").eval()
    randomize(theirs)
    ours = build_baseline(require_baseline("resnet50")).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(ours(images), theirs(images)) < 1e-6


@pytest.mark.parametrize("name", ["resnet50", "ResNet-50", "RESNET_50"])
def test_a_baseline_is_found_by_any_spelling(name: str) -> None:
    assert require_baseline(name).name == "ResNet-50"


def test_an_unknown_baseline_is_an_error_that_lists_the_known() -> None:
    assert find_baseline("resnet7") is None
    with pytest.raises(DeployError) as caught:
        require_baseline("resnet7")
    assert "resnet50" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("spec", SMALL[:2], ids=["basic", "bottleneck"])
def test_folding_the_norms_keeps_the_logits(spec: ResNetSpec, pictures: np.ndarray) -> None:
    net = make(spec)
    folded = fold_batch_norms(net)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert relative(logits_of(folded, torch.from_numpy(pictures)), logits(spec)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("spec", SMALL, ids=["basic", "bottleneck", "vgg"])
def test_the_graph_gives_the_nets_logits(
    spec: ResNetSpec | VggSpec, precision: Precision, pictures: np.ndarray, tmp_path: Path
) -> None:
    net, images = make(spec), torch.from_numpy(pictures)
    half = precision is Precision.FP16
    path = tmp_path / "net.onnx"
    floats = BaselineFloats(np.dtype(np.float16 if half else np.float32))
    graph = to_baseline_onnx(net, floats, GraphOptions(64, 64), {})
    assert find_simplification(graph.without_values()) is None
    write_graph(graph, path)
    found = torch.from_numpy(OnnxRunner(path).run(pictures)["logits"])
    limit = 1e-2 if half else 2 * error_of_float32_sums(fold_batch_norms(net).double(), images)
    assert relative(found, logits(spec)) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("for_engine", [False, True])
@pytest.mark.parametrize("spec", SMALL, ids=["basic", "bottleneck", "vgg"])
def test_the_int8_graph_is_near_and_all_its_convolutions_are_int8(
    spec: ResNetSpec | VggSpec, for_engine: bool, pictures: np.ndarray, tmp_path: Path
) -> None:
    graph = int8_graph(spec, for_engine)
    assert find_simplification(graph.without_values()) is None
    made_by = {node.output[0]: node.op_type for node in graph.model.graph.node}
    convolutions = [node for node in graph.model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert convolutions
    for node in convolutions:
        # As the Q/DQ graph of a RepVGG: a Flatten may stand between the pair and the classifier.
        assert made_by[node.input[0]] in ("DequantizeLinear", "Flatten", "MaxPool"), node.name
        assert made_by[node.input[1]] == "DequantizeLinear"
    # In front of a sum TensorRT wants a pair on the skip alone.
    sums = [node for node in graph.model.graph.node if node.name.endswith(".sum")]
    main = {made_by[node.input[0]] for node in sums}
    assert main == ({"Conv"} if for_engine else {"DequantizeLinear"}) or not sums
    assert {made_by[node.input[1]] for node in sums} <= {"DequantizeLinear"}
    path = tmp_path / "net.onnx"
    write_graph(graph, path)
    found = torch.from_numpy(OnnxRunner(path).run(pictures)["logits"])
    # A net of random weights enlarges the rounding; a wrong scale or axis would give an error above 1.
    assert relative(found, logits(spec)) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("spec", SMALL, ids=["basic", "bottleneck", "vgg"])
def test_onnx_runtime_runs_all_convolutions_of_the_int8_graph_as_integers(
    spec: ResNetSpec | VggSpec, tmp_path: Path
) -> None:
    graph = int8_graph(spec, for_engine=False)
    write_graph(graph, tmp_path / "net.onnx")
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    runtime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "Conv" not in ops
    assert ops.count("QLinearConv") == graph.op_histogram()["Conv"]
    assert ops.count("QGemm") == graph.op_histogram()["Gemm"]


def test_the_graph_has_no_norms_left() -> None:
    ops = to_baseline_onnx(make(SMALL[1]), BaselineFloats(), GraphOptions(64, 64), {}).op_histogram()
    assert set(ops) == {"Conv", "Relu", "MaxPool", "Add", "GlobalAveragePool", "Flatten", "Gemm"}


def test_seeded_weights_are_the_same_each_time(pictures: np.ndarray) -> None:
    images = torch.from_numpy(pictures)
    first, second = (make.__wrapped__(SMALL[0])(images) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert 0.01 < float(first.std()) < 100
