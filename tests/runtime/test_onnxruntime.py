"""ONNX Runtime runs on the provider that was asked for, or says why not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.engine_graphs import PIXELS, small_onnx

from repvgg_deploy.artifacts import Precision, PreprocessingOptions
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.runtime import onnxruntime as onnx_runner
from repvgg_deploy.runtime.model import open_model
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.workflows.inspect import _describe_tensor, inspect_file


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "ROCMExecutionProvider"])
def test_a_provider_that_is_not_there_is_an_error_not_the_cpu(provider: str, tmp_path: Path) -> None:
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(DeployError, match=f"has no {provider}") as raised:
        OnnxRunner(small_onnx(tmp_path), provider)
    assert "onnxruntime-gpu" in raised.value.hint
    assert "would have run on CPUExecutionProvider" in raised.value.message


def test_a_provider_that_takes_nothing_of_the_graph_is_named_not_the_graph(tmp_path: Path) -> None:
    # What CUDA's provider is where its libraries are missing: listed, and left out of the session.
    provider = "AzureExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {provider}")
    with pytest.raises(DeployError, match=f"{provider} of ONNX Runtime does not load here") as raised:
        OnnxRunner(small_onnx(tmp_path), provider)
    assert not isinstance(raised.value, GraphError)
    assert "install what that provider needs" in raised.value.hint


def test_threads_sleep_while_they_wait_unless_speed_alone_is_measured(tmp_path: Path) -> None:
    graph = small_onnx(tmp_path)
    for runner, expected in (
        (OnnxRunner(graph), "0"),
        (open_model(graph).runner, "0"),
        (OnnxRunner(graph, spinning=True), "1"),
    ):
        options = runner._session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == expected


def test_threads_are_those_asked_for_or_as_many_as_a_container_has_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = small_onnx(tmp_path)

    def threads(runner: OnnxRunner) -> int:
        return int(runner._session.get_session_options().intra_op_num_threads)

    assert threads(OnnxRunner(graph)) == 0
    monkeypatch.setattr(onnx_runner, "core_limit", lambda: 3)
    assert threads(OnnxRunner(graph)) == 3
    assert threads(OnnxRunner(graph, threads=2)) == 2


class Runtime:
    """An ONNX Runtime with the provider of a GPU."""

    __version__ = "1.99"
    preloaded = 0
    loads: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider")
    given: tuple[object, ...] = ()

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def SessionOptions(self) -> onnxruntime.SessionOptions:
        return onnxruntime.SessionOptions()

    def preload_dlls(self) -> None:
        print("Failed to load libcudnn.so.9")
        self.preloaded += 1

    def InferenceSession(self, model: str, options: object, providers: list[object], enable_fallback: int) -> object:
        del options, enable_fallback
        self.given = (*providers, self.preloaded)
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: list(self.loads)
        return session


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    monkeypatch.setattr(onnx_runner, "import_onnxruntime", lambda: fake)
    return fake


def test_a_provider_that_loads_another_one_is_an_error(tmp_path: Path, runtime: Runtime) -> None:
    runtime.loads = ("CPUExecutionProvider",)
    with pytest.raises(DeployError, match=r"CUDAExecutionProvider .* would have run on CPUExecutionProvider"):
        OnnxRunner(small_onnx(tmp_path), "CUDAExecutionProvider")


def test_int8_graphs_are_refused_on_cuda_which_would_run_them_in_float(tmp_path: Path, runtime: Runtime) -> None:
    path = small_onnx(tmp_path, Precision.INT8)
    with pytest.raises(DeployError, match="no integer convolutions for CUDA") as raised:
        OnnxRunner(path, "CUDAExecutionProvider")
    assert "fp16" in raised.value.hint
    assert runtime.given == ()


def test_what_is_bound_is_run_without_copies_between(tmp_path: Path) -> None:
    """On the CPU, whose memory is bound in the same way as a GPU's."""
    runner = OnnxRunner(small_onnx(tmp_path))
    images = [np.random.default_rng(n).normal(size=(2, 3, PIXELS, PIXELS)).astype(np.float32) for n in range(2)]
    bound, other = runner.bind(images[0]), runner.bind(images[1][:1])
    for _ in range(2):
        bound.upload()
        bound.run()
        other.run()
    np.testing.assert_array_equal(bound.download()["logits"], runner.run(images[0])["logits"])
    np.testing.assert_array_equal(other.download()["logits"], runner.run(images[1][:1])["logits"])


def conv_graph(
    path: Path, channels: int = 3, size: int | str = "height", batch: int | str = "batch", outputs: bool = True
) -> Path:
    """A convolution, then a Gemm for maps of 8 x 8 pixels only."""

    def value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    weights = {"kernel": (2, channels, 3, 3), "matrix": (2 * 64, 5)}
    nodes = [
        onnx.helper.make_node("Conv", ["images", "kernel"], ["map"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Flatten", ["map"], ["row"]),
        onnx.helper.make_node("Gemm", ["row", "matrix"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [value("images", [batch, channels, size, size])],
        [value("logits", [batch, 5])] if outputs else [],
        [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 16, 16), np.float32),
        ((1, 1, 8, 8), np.float32),
        ((1, 4, 8, 8), np.float32),
        ((1, 3, 8, 8), np.float16),
        ((3, 8, 8), np.float32),
    ],
    ids=["another size", "1 channel", "4 channels", "another type", "no batch"],
)
def test_inputs_that_a_graph_cannot_take_are_errors_of_this_tool(
    shape: tuple[int, ...], dtype: type, tmp_path: Path
) -> None:
    runner = OnnxRunner(conv_graph(tmp_path / "net.onnx"))
    said = f"cannot be run on an input of {'x'.join(map(str, shape))} {np.dtype(dtype)}"
    for run in (runner.run, runner.bind):
        with pytest.raises(GraphError, match=said) as raised:
            run(np.zeros(shape, dtype))
        assert raised.value.hint


def test_a_batch_that_memory_cannot_hold_is_told_as_that(tmp_path: Path) -> None:
    runner = OnnxRunner(conv_graph(tmp_path / "net.onnx"))
    session = runner._session

    class Session:
        def run(self, *_: object) -> None:
            # Of ONNX Runtime's own classes, with its own words.
            raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(
                "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad_alloc: Failed to allocate memory for requested buffer"
            )

    runner._session = Session()
    with pytest.raises(GraphError, match=r"too little memory to run .* on an input of 4x3x8x8") as raised:
        runner.run(np.zeros((4, 3, 8, 8), np.float32))
    assert raised.value.hint == "a smaller batch"
    runner._session = session


def test_a_fixed_batch_of_nothing_or_of_more_than_memory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="takes inputs of 0x3x8x8, which are empty"):
        OnnxRunner(conv_graph(tmp_path / "none.onnx", size=8, batch=0))
    model = open_model(conv_graph(tmp_path / "huge.onnx", size=8, batch=10**10), PreprocessingOptions(size=(8, 8)))
    with pytest.raises(DeployError, match=r"the batch of 10000000000 that .* takes needs .* GiB") as raised:
        model.run_pixels(np.zeros((2, 8, 8, 3), np.uint8))
    assert raised.value.hint
    model = open_model(conv_graph(tmp_path / "many.onnx", size=8, batch=10**7), PreprocessingOptions(size=(8, 8)))
    with pytest.raises(DeployError, match="would be zeros but for 2 images"):
        model.run_pixels(np.zeros((2, 8, 8, 3), np.uint8))


def pooled_graph(path: Path, size: int, batch: int | str = "batch") -> Path:
    """The mean of each channel, of images of any size."""
    value = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
        onnx.helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    images = value("images", onnx.TensorProto.FLOAT, [batch, 3, size, size])
    graph = onnx.helper.make_graph(nodes, "graph", [images], [value("logits", onnx.TensorProto.FLOAT, [batch, 3])])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_images_larger_than_any_are_an_error_and_large_ones_are_run_in_small_batches(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="images of 100000x100000 are too large"):
        open_model(pooled_graph(tmp_path / "huge.onnx", 100_000))
    assert open_model(pooled_graph(tmp_path / "large.onnx", 4096)).images_per_run(64) == 5
    assert open_model(pooled_graph(tmp_path / "usual.onnx", 224)).images_per_run(64) == 64
    assert open_model(pooled_graph(tmp_path / "fixed.onnx", 4096, batch=7)).images_per_run(64) == 7


@pytest.mark.parametrize("name", [b"images", b"Conv"])
def test_names_that_are_not_utf8_are_an_error(name: bytes, tmp_path: Path) -> None:
    path = conv_graph(tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes().replace(name, name[:-2] + b"\xff\xfe"))
    with pytest.raises(GraphError, match="names that are not UTF-8"):
        OnnxRunner(path)


def test_a_graph_of_an_unknown_type_is_inspected_all_the_same(tmp_path: Path) -> None:
    path = conv_graph(tmp_path / "net.onnx")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = 99
    path.write_bytes(model.SerializeToString())
    assert _describe_tensor(onnx.load(path).graph.input[0])["dtype"] == "type 99"
    with pytest.raises(GraphError, match="ONNX Runtime does not load"):
        OnnxRunner(path)


@pytest.mark.parametrize("quick_start", [False, True])
def test_a_path_that_is_not_utf8_is_an_error(quick_start: bool, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"net\xff")
    folder.mkdir()
    path = conv_graph(tmp_path / "net.onnx").rename(folder / "net.onnx")
    with pytest.raises(GraphError, match="whose path is not UTF-8"):
        OnnxRunner(path, quick_start=quick_start)


def test_weights_of_an_unknown_type_are_described_by_its_number(tmp_path: Path) -> None:
    path = conv_graph(tmp_path / "net.onnx")
    model = onnx.load(path)
    model.metadata_props.add(key="repvgg_deploy.version", value="0.1.0")
    model.graph.initializer[0].name = "conv.weight"
    model.graph.initializer[0].data_type = 2**31 - 1
    path.write_bytes(model.SerializeToString())
    assert inspect_file(path)["weight_types"] == ["type 2147483647"]


def test_onnx_runtime_prints_nothing_of_a_tensor_larger_than_any_memory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = conv_graph(tmp_path / "net.onnx")
    model = onnx.load(path)
    bias = onnx.numpy_helper.from_array(np.zeros(5, np.float32), "bias")
    bias.dims[:] = [2**62]
    model.graph.initializer.append(bias)
    model.graph.node[-1].input.append("bias")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="does not load"):
        OnnxRunner(path)
    assert capfd.readouterr() == ("", "")


def test_a_graph_without_outputs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GraphError):
        OnnxRunner(conv_graph(tmp_path / "net.onnx", outputs=False))


OUTPUTS = {
    "rows of another number": ("Reshape", [-1, 8], onnx.TensorProto.FLOAT, "has 6x8, where 3 images were given"),
    "no rows": ("ReduceSum", None, onnx.TensorProto.FLOAT, "has no dimensions, where 3 images"),
    "no columns": ("Slice", [0], onnx.TensorProto.FLOAT, "has 3x0, where 3 images"),
    "texts": ("Cast", None, onnx.TensorProto.STRING, "is not of numbers"),
    "a sequence": ("SequenceConstruct", None, onnx.TensorProto.FLOAT, "is not of numbers"),
}


def graph_that_gives(kind: str, path: Path) -> Path:
    """One row of 16 numbers per image of 4 x 4 pixels, given as something else."""
    operator, numbers, element, _ = OUTPUTS[kind]
    names = [] if numbers is None else ["numbers"] * (4 if operator == "Slice" else 1)
    more: dict[str, object] = {"to": element} if operator == "Cast" else {}
    if operator == "ReduceSum":
        more = {"keepdims": 0}
    nodes = [
        onnx.helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1], keepdims=0),
        onnx.helper.make_node("Flatten", ["mean"], ["row"]),
        onnx.helper.make_node(operator, ["row", *names[:1], *names[1:3]], ["logits"], **more),
    ]
    if operator == "Slice":
        nodes[-1] = onnx.helper.make_node("Slice", ["row", "numbers", "numbers", "one"], ["logits"])
    make = onnx.helper.make_tensor_sequence_value_info if kind == "a sequence" else onnx.helper.make_tensor_value_info
    given = [onnx.numpy_helper.from_array(np.array([1], np.int64), "one")]
    if numbers is not None:
        given.append(onnx.numpy_helper.from_array(np.array(numbers, np.int64), "numbers"))
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [make("logits", element, None)],
        given,
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_that_is_no_row_of_numbers_per_image_is_an_error(kind: str, tmp_path: Path) -> None:
    runner = OnnxRunner(graph_that_gives(kind, tmp_path / "net.onnx"))
    with pytest.raises(GraphError, match=OUTPUTS[kind][3]) as raised:
        runner.run(np.ones((3, 3, 4, 4), np.float32))
    assert raised.value.hint == "an image classifier has one output N,classes"


def test_fp32_on_cuda_is_without_tf32(tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    runner = OnnxRunner(small_onnx(tmp_path), "CUDAExecutionProvider")
    # The libraries of pip's packages were loaded before the session, without a word on standard output.
    wanted = {"use_tf32": "0", "prefer_nhwc": "1", "enable_cuda_graph": "1"}
    assert runtime.given == (("CUDAExecutionProvider", wanted), 1)
    assert capsys.readouterr().out == ""
    assert runner.backend == "onnxruntime-cuda"


def test_the_cpu_needs_no_cuda_libraries(tmp_path: Path, runtime: Runtime) -> None:
    runtime.loads = ("CPUExecutionProvider",)
    OnnxRunner(small_onnx(tmp_path))
    assert runtime.given == ("CPUExecutionProvider", 0)


def test_the_cpu_provider_names_itself(tmp_path: Path) -> None:
    runner = OnnxRunner(small_onnx(tmp_path))
    assert runner.backend == "onnxruntime-cpu"
    assert runner.run(np.zeros((2, 3, PIXELS, PIXELS), np.float32))["logits"].shape == (2, 10)
