"""`package` writes a model repository that agrees with its graphs, or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.pictures import noise
from helpers.sidecars import make_side
from helpers.small_nets import make_net, name_in_layout

from repvgg_deploy.artifacts import Preprocessing, PreprocessingOptions
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.engine.sidecar import Sidecar, sidecar_path
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.graphs.preprocessing import PIXELS, NetInput, make_preprocessing
from repvgg_deploy.hardware.gpus import Gpu
from repvgg_deploy.images.decoding import DecodingOptions
from repvgg_deploy.runtime.model import open_model
from repvgg_deploy.runtime.session import GraphSession
from repvgg_deploy.serving import PredictOptions, Predictor
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_request import ExportRequest, GraphRequest
from repvgg_deploy.workflows.package import PackageRequest, ServingOptions, package
from repvgg_deploy.workflows.package_checks import compare_with_pillow, read_pictures
from repvgg_deploy.workflows.package_sources import read_source


def make_graph(folder: Path, **graph: Any) -> Path:
    """A small net's graph with class names."""
    folder.mkdir(exist_ok=True)
    torch.save(name_in_layout(make_net(), "official"), folder / "net.pth")
    request = ExportRequest(
        checkpoint=folder / "net.pth",
        output=folder,
        preprocessing=PreprocessingOptions(size=(64, 64)),
        graph=GraphRequest(class_names=tuple(f"class {index}" for index in range(5)), **graph),
        engine="none",
    )
    return export(request).onnx


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_graph(tmp_path_factory.mktemp("graph"))


def run_self_test(repository: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, repository / "self_test.py"], capture_output=True, text=True, check=False, cwd="/"
    )


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_graph_becomes_three_entries_that_pass_their_self_test(graph: Path, tmp_path: Path) -> None:
    result = package(PackageRequest((graph,), tmp_path / "repo", "net"))
    assert result.entries == ("net", "net_preprocess", "net_images")
    assert (result.entry_version, result.backend, result.max_batch, result.golden) == (1, "onnxruntime", 32, True)
    assert result.preprocessing is not None
    assert result.preprocessing.equal > 99
    golden = {f"test_data_set_0/{kind}_0.pb" for kind in ("input", "output")}
    assert files_below(tmp_path / "repo") == {
        "self_test.py",
        *(f"{name}/config.pbtxt" for name in result.entries),
        *(f"{name}/labels.txt" for name in ("net", "net_images")),
        *(f"{name}/1/model.onnx" for name in ("net", "net_preprocess")),
        *(f"{name}/1/{file}" for name in result.entries for file in golden),
        *(f"net/1/test_data_set_0/{file}" for file in ("README.md", "input_0.bin", "output_0.bin")),
    }
    assert (tmp_path / "repo/net/labels.txt").read_text() == "".join(f"class {index}\n" for index in range(5))
    done = run_self_test(tmp_path / "repo")
    assert (done.returncode, done.stdout.count(": ok")) == (0, 3), done


@pytest.mark.slow
def test_the_ensemble_s_graphs_give_the_scores_of_predict(graph: Path, tmp_path: Path) -> None:
    package(PackageRequest((graph,), tmp_path, "net"))
    picture = np.asarray(noise(90, 130))
    prepared = GraphSession(tmp_path / "net_preprocess/1/model.onnx").run({PIXELS: picture})
    logits = GraphSession(tmp_path / "net/1/model.onnx").run(prepared)["logits"][0]
    options = PredictOptions(output="logits", decoding=DecodingOptions(decoder="pillow"))
    (expected,) = Predictor(open_model(graph), options)([picture])
    assert np.allclose(logits, expected.logits, atol=0.02 * np.abs(logits).max())


def test_a_graph_that_prepares_images_otherwise_than_pillow_is_refused(graph: Path) -> None:
    source, pictures = read_source([graph]), read_pictures(None)
    net_input = NetInput("images", "float32")
    right = GraphSession(make_preprocessing(source.preprocessing, net_input).to_proto())
    assert compare_with_pillow(right, source, pictures).max_levels <= 1
    wrong = GraphSession(make_preprocessing(replace(source.preprocessing, resize=80), net_input).to_proto())
    with pytest.raises(VerificationError, match="of Pillow's values on 6 images"):
        compare_with_pillow(wrong, source, pictures)


def test_the_configs_are_read_by_triton_s_protobuf_and_agree_with_the_graphs(graph: Path, tmp_path: Path) -> None:
    module = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    import onnx
    from google.protobuf import text_format

    package(PackageRequest((graph,), tmp_path, "net"))
    types = {"TYPE_FP32": onnx.TensorProto.FLOAT, "TYPE_UINT8": onnx.TensorProto.UINT8}
    for name in ("net", "net_preprocess"):
        config = text_format.Parse((tmp_path / name / "config.pbtxt").read_text(), module.ModelConfig())
        model = onnx.load(tmp_path / name / "1" / config.default_model_filename)
        for declared, actual in ((config.input, model.graph.input), (config.output, model.graph.output)):
            assert [tensor.name for tensor in declared] == [tensor.name for tensor in actual]
            for tensor, value in zip(declared, actual, strict=True):
                kind = value.type.tensor_type
                dims = [size.dim_value or -1 for size in kind.shape.dim]
                assert [*([-1] if config.max_batch_size else []), *tensor.dims] == dims
                assert types[module.DataType.Name(tensor.data_type)] == kind.elem_type


@pytest.mark.slow
def test_a_second_call_adds_a_version_and_keeps_what_was_changed_by_hand(graph: Path, tmp_path: Path) -> None:
    package(PackageRequest((graph,), tmp_path, "net"))
    config = tmp_path / "net" / "config.pbtxt"
    config.write_text(config.read_text() + "version_policy { latest { num_versions: 2 } }\n")
    assert package(PackageRequest((graph,), tmp_path, "net")).entry_version == 2
    assert config.read_text().endswith("num_versions: 2 } }\n")
    assert {path.name for path in (tmp_path / "net").iterdir()} == {"1", "2", "config.pbtxt", "labels.txt"}
    assert run_self_test(tmp_path).stdout.count(": ok") == 6


def test_another_model_s_name_is_not_taken(graph: Path, tmp_path: Path) -> None:
    package(PackageRequest((graph,), tmp_path, "net"))
    before = files_below(tmp_path)
    with pytest.raises(DeployError, match="other tensors, batches, files or classes"):
        package(PackageRequest((graph,), tmp_path, "net", ServingOptions(max_batch=8)))
    assert files_below(tmp_path) == before


@pytest.mark.slow
def test_a_fixed_batch_is_served_without_batching(tmp_path: Path) -> None:
    several = make_graph(tmp_path / "graph", batch=4)
    with pytest.raises(DeployError, match="batches of 4") as caught:
        package(PackageRequest((several,), tmp_path / "repo"))
    assert "--no-preprocess" in caught.value.hint
    assert not (tmp_path / "repo").exists()
    result = package(PackageRequest((several,), tmp_path / "repo", preprocess=False))
    assert (result.max_batch, result.entries, result.preprocessing) == (0, ("net_fp32",), None)
    assert "dims: [ 4, 3, 64, 64 ]" in (tmp_path / "repo/net_fp32/config.pbtxt").read_text()
    assert run_self_test(tmp_path / "repo").returncode == 0


@pytest.mark.slow
def test_a_batch_larger_than_memory_or_any_number_of_channels_is_an_error(graph: Path, tmp_path: Path) -> None:
    model = onnx.load(graph)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value = 10**12
    onnx.save(model, tmp_path / "batch.onnx")
    for preprocess in (True, False):
        with pytest.raises(DeployError, match=r"batches of 1000000000000|the batch of 1000000000000"):
            package(PackageRequest((tmp_path / "batch.onnx",), tmp_path / "out", preprocess=preprocess))
    dims[0].dim_param, dims[1].dim_param = "N", "C"
    onnx.save(model, tmp_path / "channels.onnx")
    with pytest.raises(DeployError, match="takes any number of channels"):
        package(PackageRequest((tmp_path / "channels.onnx",), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_graph_that_gives_no_numbers_is_not_packaged(graph: Path, tmp_path: Path) -> None:
    model = onnx.load(graph)
    bias = next(item for item in model.graph.initializer if item.name.endswith("bias"))
    bias.raw_data = np.full(list(bias.dims), np.nan, np.float32).tobytes()
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(VerificationError, match="gives NaN or Inf"):
        package(PackageRequest((tmp_path / "net.onnx",), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_config_that_is_no_text_is_an_error(graph: Path, tmp_path: Path) -> None:
    config = tmp_path / "out" / "net_fp32" / "config.pbtxt"
    config.parent.mkdir(parents=True)
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(DeployError, match="is not text"):
        package(PackageRequest((graph,), tmp_path / "out"))
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(DeployError, match="is not a regular file"):
        package(PackageRequest((graph,), tmp_path / "out"))


@pytest.mark.slow
def test_a_graph_of_pixels_gets_pixels(tmp_path: Path) -> None:
    pixels = make_graph(tmp_path / "graph", uint8_input=True)
    package(PackageRequest((pixels,), tmp_path / "repo", "net"))
    assert "data_type: TYPE_UINT8\n  dims: [ 64, 64, 3 ]" in (tmp_path / "repo/net/config.pbtxt").read_text()
    assert run_self_test(tmp_path / "repo").stdout.count(": ok") == 3


def make_plan(path: Path, capability: str = "8.9", **changes: Any) -> Path:
    """A file in a plan's place, whose sidecar says that TensorRT built it; it is never loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = f"plan for {capability}".encode()
    path.write_bytes(content)
    gpu = Gpu(name="a GPU", compute_capability=capability, memory_bytes=16 << 30)
    side: Sidecar = make_side(hashlib.sha256(content).hexdigest(), len(content), gpu)
    assert side.provenance is not None
    known = replace(side.provenance, preprocessing=Preprocessing(), class_names=None)
    sidecar_path(path).write_text(replace(side, provenance=known, **changes).to_json())
    return path


def test_plans_for_several_gpus_are_one_entry(tmp_path: Path) -> None:
    plans = (make_plan(tmp_path / "l4" / "net.plan", "8.9"), make_plan(tmp_path / "t4" / "net.plan", "7.5"))
    result = package(PackageRequest(plans, tmp_path / "repo", "net"))
    assert (result.backend, result.max_batch, result.preferred, result.golden) == ("tensorrt", 256, (32, 256), False)
    config = (tmp_path / "repo/net/config.pbtxt").read_text()
    for capability, plan in (("8.9", plans[0]), ("7.5", plans[1])):
        assert f'key: "{capability}"\n  value: "model_{capability}.plan"' in config
        assert (tmp_path / f"repo/net/1/model_{capability}.plan").read_bytes() == plan.read_bytes()
    assert "graphs: true" in config
    assert "KIND_GPU" in config


@pytest.mark.slow
def test_a_plan_has_the_golden_outputs_of_the_graph_that_it_was_built_from(graph: Path, tmp_path: Path) -> None:
    shutil.copyfile(graph, tmp_path / "net.onnx")
    tensors = {
        "inputs": (Tensor("images", "float32", (-1, 3, 224, 224)),),
        "outputs": (Tensor("logits", "float32", (-1, 5)),),
    }
    plan = make_plan(tmp_path / "net.plan", onnx_sha256="2" * 64, **tensors)
    assert not package(PackageRequest((plan,), tmp_path / "none")).golden
    plan = make_plan(tmp_path / "net.plan", onnx_sha256=hash_file(graph), **tensors)
    known = Preprocessing(height=64, width=64, resize=64)
    side = make_side(hash_file(plan), plan.stat().st_size, Gpu("a GPU", "8.9", 1 << 30))
    assert side.provenance is not None
    side = replace(
        side,
        provenance=replace(side.provenance, preprocessing=known, class_names=None),
        onnx_sha256=hash_file(graph),
        inputs=(Tensor("images", "float32", (-1, 3, 64, 64)),),
        outputs=tensors["outputs"],
    )
    sidecar_path(plan).write_text(side.to_json())
    assert package(PackageRequest((plan,), tmp_path / "repo", "net")).golden
    said = run_self_test(tmp_path / "repo")
    assert (said.returncode, "net/1: not run" in said.stdout, "net_preprocess/1: ok" in said.stdout) == (0, True, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "tensorrt-rtx", "backend_version": "1.7.1.116"}, "loads plans of TensorRT only"),
        ({"has_weights": False}, "has no weights"),
        ({"bytes": 5}, "longer than it was"),
        ({"profile": (8, 16, 32)}, "sends single requests too"),
        ({"provenance": None}, "how images become its input"),
    ],
)
def test_plans_that_triton_cannot_serve_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "net.plan", **{key: value for key, value in changes.items() if key != "provenance"})
    if "provenance" in changes:
        side = make_side(hash_file(plan), plan.stat().st_size, Gpu("a GPU", "8.9", 1 << 30))
        sidecar_path(plan).write_text(replace(side, provenance=None).to_json())
    with pytest.raises(DeployError, match=said):
        package(PackageRequest((plan,), tmp_path / "repo"))
    assert not (tmp_path / "repo").exists()


def test_files_that_do_not_go_together_are_refused(graph: Path, tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "a.plan")
    for others, said in (
        ((make_plan(tmp_path / "b.plan"),), "both for compute capability 8.9"),
        ((make_plan(tmp_path / "c.plan", "9.0", onnx_sha256="3" * 64),), "another graph"),
        ((graph,), "cannot be one entry"),
        ((graph.with_name("net.pth"),), "neither an ONNX graph nor a plan"),
        ((tmp_path / "none.onnx",), "no file"),
    ):
        with pytest.raises(DeployError, match=said):
            package(PackageRequest((plan, *others), tmp_path / "repo"))
    for options, said in ((ServingOptions(device="cpu"), "does not run"), (ServingOptions(max_batch=512), "up to 256")):
        with pytest.raises(DeployError, match=said):
            package(PackageRequest((plan,), tmp_path / "repo", serving=options))
    with pytest.raises(DeployError, match="not a valid model name"):
        package(PackageRequest((graph,), tmp_path / "repo", "../net"))
