"""Graphs and machines that cannot give an engine: one clear error each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from helpers.engine_graphs import rtx_backend, small_onnx
from helpers.simulated_engine import SimulatedCuda, simulate
from onnx import TensorProto, helper

from repvgg_deploy.engine import BuildOptions, build_engine, loading, network
from repvgg_deploy.engine import log as messages
from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.engine.loading import _deserialize
from repvgg_deploy.engine.log import Messages, construct, explain_failure
from repvgg_deploy.engine.network import create_builder
from repvgg_deploy.engine.refit import _put_weights
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.graphs.serialization import read_onnx_metadata
from repvgg_deploy.hardware.gpus import FoundGpus, Gpu, find_gpus

NO_CACHE = BuildOptions(timing_cache=False)
without_gpu = pytest.mark.skipif(bool(find_gpus().gpus), reason="this machine has a GPU")


def save_graph(path: Path, nodes: list[onnx.NodeProto], shape: tuple[int | str, ...] = (1, 3, 8, 8)) -> Path:
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [images], [logits])
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("nobody.knows", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def test_an_operator_that_the_library_lacks_is_named_with_its_node(tmp_path: Path) -> None:
    node = helper.make_node("Mystery", ["images"], ["logits"], name="the_odd_one", domain="nobody.knows")
    path = save_graph(tmp_path / "odd.onnx", [node])
    with pytest.raises(GraphError, match="the_odd_one") as raised:
        build_engine(path, rtx_backend(), NO_CACHE, tmp_path)
    assert "Mystery" in raised.value.message


def test_every_refused_node_is_told(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mystery", ["images"], ["between"], name="first_odd", domain="nobody.knows"),
        helper.make_node("Riddle", ["between"], ["logits"], name="second_odd", domain="nobody.knows"),
    ]
    with pytest.raises(GraphError) as raised:
        build_engine(save_graph(tmp_path / "odd.onnx", nodes), rtx_backend(), NO_CACHE, tmp_path)
    assert "first_odd" in raised.value.message
    assert "second_odd" in raised.value.message


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"there is no file .*none\.onnx"):
        build_engine(tmp_path / "none.onnx", rtx_backend(), NO_CACHE, tmp_path)


def test_a_cut_graph_is_refused(tmp_path: Path) -> None:
    path = small_onnx(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(GraphError, match="is not an ONNX graph, or a damaged one"):
        build_engine(path, rtx_backend(), NO_CACHE, tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("this is no graph\n" * 10, encoding="utf-8")
    with pytest.raises(GraphError, match="is not an ONNX graph"):
        build_engine(path, rtx_backend(), NO_CACHE, tmp_path)


def test_a_graph_with_a_dynamic_image_size_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["images"], ["logits"], name="relu")
    path = save_graph(tmp_path / "dynamic.onnx", [node], ("batch", 3, "height", "width"))
    with pytest.raises(GraphError, match="dynamic beyond the batch"):
        build_engine(path, rtx_backend(), NO_CACHE, tmp_path)


def test_a_graph_that_takes_no_images_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["images"], ["logits"], name="relu")
    path = save_graph(tmp_path / "flat.onnx", [node], (1, 3))
    with pytest.raises(GraphError, match="one batch of images"):
        build_engine(path, rtx_backend(), NO_CACHE, tmp_path)


@pytest.mark.slow
@without_gpu
@pytest.mark.parametrize("option", ["refittable", "strip_weights"])
def test_refittable_engines_need_a_gpu_and_the_error_says_so(option: str, tmp_path: Path) -> None:
    options = replace(NO_CACHE, **{option: True})
    with pytest.raises(DeployError, match="on a GPU only") as raised:
        build_engine(small_onnx(tmp_path), rtx_backend(), options, tmp_path)
    assert "--refittable" in raised.value.hint
    assert not list(tmp_path.glob("*.plan*"))


@without_gpu
def test_the_cause_is_told_not_the_missing_driver_that_is_logged_beside_it(tmp_path: Path) -> None:
    options = replace(NO_CACHE, compute_capabilities=("7.5",))
    with pytest.raises(DeployError, match="no FP32 classifier for compute capability") as raised:
        build_engine(small_onnx(tmp_path), rtx_backend(), options, tmp_path)
    assert "--fp16" in raised.value.hint


@without_gpu
@pytest.mark.parametrize(
    ("logged", "said"),
    [
        ("Error Code 1: Cuda Runtime (out of memory)", "too little free memory"),
        ("Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)", "too little free memory"),
        ("cudaError 35: CUDA driver version is insufficient for CUDA runtime version", "driver"),
        ("Unable to load library: libnvinfer_lean.so.1", "no lean runtime"),
        ("Version tag does not match. Note: Current Version: 0, Serialized Engine Version: 240", "another version"),
        ("Could not find any implementation for node conv", "no kernel"),
        ("Error Code 99: nobody has seen this one", "nobody has seen this one"),
    ],
)
def test_what_the_library_logs_becomes_one_error_with_a_hint(logged: str, said: str) -> None:
    error = explain_failure(rtx_backend(), "the engine build", Messages([logged], []))
    assert said in error.message
    assert error.hint


@without_gpu
def test_what_the_library_cannot_make_is_told_with_what_it_logged() -> None:
    def constructor() -> object:
        # As pybind11 says it.
        raise TypeError("pybind11::init(): factory function returned nullptr")

    logged = Messages(["Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)"], [])
    with pytest.raises(DeployError, match=r"loading net\.plan failed: the GPU has too little free memory"):
        construct(rtx_backend(), "loading net.plan", logged, constructor)
    assert construct(rtx_backend(), "loading net.plan", Messages(), lambda: 7) == 7


def module_without_cuda() -> Backend:
    """TensorRT-RTX with constructors that give null, as where CUDA does not start."""
    real = rtx_backend()

    def refuse(*_: object) -> object:
        raise TypeError("factory function returned nullptr")

    module = ModuleType("tensorrt_without_cuda")
    module.__dict__.update(vars(real.module))
    for name in ("Builder", "Runtime", "Refitter"):
        setattr(module, name, refuse)
    return replace(real, module=module)


def test_a_builder_that_does_not_start_names_a_gpu_that_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = FoundGpus((Gpu("NVIDIA H200", "9.0", 141 << 30),))
    monkeypatch.setattr(messages, "find_gpus", lambda: found)
    monkeypatch.setattr(network, "find_gpus", lambda: found)
    with pytest.raises(DeployError, match="does not support the NVIDIA H200") as raised:
        create_builder(module_without_cuda())
    assert "--engine tensorrt" in raised.value.hint


@without_gpu
def test_a_builder_that_does_not_start_without_a_gpu_says_so() -> None:
    with pytest.raises(DeployError, match="cannot build engines here") as raised:
        create_builder(module_without_cuda())
    assert "tensorrt-rtx" in raised.value.hint


@without_gpu
def test_a_runtime_and_a_refitter_that_do_not_start_are_errors(tmp_path: Path) -> None:
    backend = module_without_cuda()
    with pytest.raises(DeployError, match=r"loading net\.plan failed"):
        _deserialize(backend, Path("net.plan"), b"", None)
    with pytest.raises(DeployError, match=r"preparing simulated\.plan for new weights failed"):
        _put_weights(simulate(backend), small_onnx(tmp_path))


@pytest.mark.slow
@without_gpu
def test_a_plan_that_does_not_load_leaves_no_gpu_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimulatedCuda()
    monkeypatch.setattr(loading, "open_cuda", lambda _: cuda)
    engine = build_engine(small_onnx(tmp_path), rtx_backend(), NO_CACHE, tmp_path)
    with pytest.raises(DeployError, match=r"loading .* failed"):
        loading.load_plan(engine.plan)
    assert cuda.closed == 1


def test_metadata_is_read_without_the_graph(tmp_path: Path) -> None:
    path = small_onnx(tmp_path)
    assert read_onnx_metadata(path) == {item.key: item.value for item in onnx.load(path).metadata_props}
