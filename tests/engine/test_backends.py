"""Which library builds, which is missing, and what a user reads then."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from helpers.engine_graphs import provenance, rtx_backend, small_onnx
from helpers.progress import Heard
from helpers.requests import make_request
from helpers.sidecars import make_side

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.engine import BuildOptions, Unavailable, build_engine, find_backend
from repvgg_deploy.engine.backends import Backend, Capabilities, has, import_backend, release, unsupported_gpu
from repvgg_deploy.engine.refit import (
    describe_refitted,
    graph_options,
    refit_engine,
    require_same_net,
)
from repvgg_deploy.engine.runner import load_engine
from repvgg_deploy.engine.sidecar import Sidecar, read_sidecar
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.hardware.gpus import Gpu, find_gpus
from repvgg_deploy.progress import SILENT
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.refit import _check_refitted, export_for_refit

without_gpu = pytest.mark.skipif(bool(find_gpus().gpus), reason="this machine has a GPU")
NO_CACHE = BuildOptions(timing_cache=False)


def test_tensorrt_rtx_is_found_by_name() -> None:
    rtx_backend()
    backend = find_backend("tensorrt-rtx")
    assert isinstance(backend, Backend)
    assert backend.label == f"TensorRT-RTX {backend.version}"
    assert backend.capabilities.builds_without_gpu


@without_gpu
def test_auto_takes_what_builds_here() -> None:
    rtx_backend()
    backend = find_backend("auto")
    assert isinstance(backend, Backend)
    assert backend.name == "tensorrt-rtx"


def test_none_is_no_error() -> None:
    assert find_backend("none") == Unavailable("no engine was requested", "")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(DeployError, match="no engine backend is called 'openvino'") as raised:
        find_backend("openvino")
    assert "tensorrt-rtx" in raised.value.hint


@without_gpu
def test_tensorrt_without_a_gpu_or_a_module_is_one_clear_error() -> None:
    with pytest.raises(DeployError, match="TensorRT") as raised:
        find_backend("tensorrt")
    assert raised.value.hint


def test_a_module_that_does_not_load_says_which_file_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(import_backend("tensorrt"), Backend):
        pytest.skip("TensorRT is installed")
    broken = "raise ImportError('libnvinfer.so.11: cannot open shared object file')"
    (tmp_path / "tensorrt.py").write_text(broken, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = import_backend.__wrapped__("tensorrt")
    assert isinstance(found, Unavailable)
    assert "libnvinfer.so.11" in found.reason


def test_a_release_that_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(import_backend("tensorrt"), Backend):
        pytest.skip("TensorRT is installed")
    (tmp_path / "tensorrt.py").write_text("__version__ = '8.6.1'", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    # Set first, so that the import is undone after the test.
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    del sys.modules["tensorrt"]
    found = import_backend.__wrapped__("tensorrt")
    assert isinstance(found, Unavailable)
    assert "TensorRT 8.6.1 is too old; 10.13 is needed" in found.reason


def test_versions_are_compared_as_numbers() -> None:
    assert release("10.9.0.34") < release("10.13.0.35") < release("11.4.0.106")
    assert release("unknown") == (0, 0)


def test_the_librarys_own_list_of_gpus_decides_what_it_supports() -> None:
    backend = rtx_backend()
    h200 = Gpu("NVIDIA H200", "9.0", 141 << 30)
    assert backend.supports(Gpu("NVIDIA L40S", "8.9", 48 << 30))
    assert not backend.supports(h200)
    message = unsupported_gpu(backend, h200)
    assert "does not support the NVIDIA H200 (compute capability 9.0)" in message
    assert "8.9" in message
    everything = Capabilities(False, True, True, False, None)
    assert Backend("tensorrt", "11.4.0.106", None, everything).supports(h200)


def test_only_listed_names_may_be_asked_for() -> None:
    with pytest.raises(ValueError, match="not listed"):
        has(rtx_backend().module, "Builder.create_network")


@pytest.mark.slow
@without_gpu
def test_running_without_a_gpu_is_one_clear_error(tmp_path: Path) -> None:
    engine = build_engine(small_onnx(tmp_path), rtx_backend(), NO_CACHE, tmp_path)
    with pytest.raises(DeployError, match="engines cannot run") as raised, load_engine(engine.plan):
        pass
    assert raised.value.hint


@pytest.mark.slow
def test_an_engine_that_was_not_built_for_it_takes_no_new_weights(tmp_path: Path) -> None:
    onnx = small_onnx(tmp_path)
    engine = build_engine(onnx, rtx_backend(), NO_CACHE, tmp_path)
    with pytest.raises(DeployError, match="was not built to be refitted with new weights") as raised:
        refit_engine(engine.plan, onnx, tmp_path)
    assert "--refittable" in raised.value.hint


def test_a_refitted_engine_says_whether_it_takes_further_weights() -> None:
    built = make_side(refittable=True, strip_weights=True)
    again = describe_refitted(replace(built, has_weights=False), rtx_backend())
    assert again == replace(built, has_weights=True)
    # TensorRT before 10.14, which has no INCLUDE_REFIT.
    module = ModuleType("tensorrt_10_13")
    old = Backend("tensorrt", "10.13.3.9", module, Capabilities(False, True, True, False, None))
    last = describe_refitted(replace(built, has_weights=False), old)
    assert last.has_weights
    assert not last.options.needs_refit
    assert "TensorRT 10.13.3.9" in last.warnings[-1]


def side_of(tmp_path: Path, precision: Precision, options: GraphOptions) -> Sidecar:
    return read_sidecar(
        build_engine(small_onnx(tmp_path, precision, options=options), rtx_backend(), NO_CACHE, tmp_path).plan
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        GraphOptions(32, 48),
        GraphOptions(32, 32, batch=2, topk=4),
        GraphOptions(32, 32, softmax=True, io=Precision.FP16),
        GraphOptions(64, 32, uint8_input=provenance(Precision.FP16).preprocessing),
    ],
)
def test_the_graph_for_new_weights_is_read_from_the_sidecar(tmp_path: Path, options: GraphOptions) -> None:
    assert graph_options(side_of(tmp_path, Precision.FP16, options)) == options


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"arch": "RepVGG-A1"}, {"precision": Precision.FP32}])
def test_weights_of_another_net_are_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    side = side_of(tmp_path, Precision.FP16, GraphOptions(32, 32))
    assert side.provenance is not None
    require_same_net(side, side.provenance)
    with pytest.raises(DeployError, match="the new weights are"):
        require_same_net(side, replace(side.provenance, **changed))


@pytest.mark.slow
def test_a_checkpoint_becomes_the_graph_that_fits_the_engine(tmp_path: Path) -> None:
    demo = data_folder("models") / "demo.safetensors"
    if not demo.is_file():
        pytest.skip("the demo checkpoint is not here")
    request = make_request(demo, tmp_path, precision=Precision.FP16, batch=3, uint8_input=True, topk=2)
    first = export(request).onnx
    engine = build_engine(first, rtx_backend(), NO_CACHE, tmp_path)
    folder = tmp_path / "again"
    again = export_for_refit(engine.side, demo, folder, SILENT)
    # All but what each setting was told by: the first export's own choice is an option of the second.
    one, other = onnx.load(again), onnx.load(first)
    assert one.graph == other.graph
    settings = [{item.key: item.value for item in model.metadata_props} for model in (one, other)]
    assert {key for key in settings[0] if settings[0][key] != settings[1][key]} <= {"repvgg_deploy.assumed"}


@pytest.mark.slow
@without_gpu
@pytest.mark.parametrize(
    "options",
    [GraphOptions(32, 32), GraphOptions(32, 48, batch=2, uint8_input=provenance(Precision.FP16).preprocessing)],
)
def test_a_refitted_engine_is_compared_with_its_graph_or_said_to_be_unverified(
    tmp_path: Path, options: GraphOptions
) -> None:
    onnx = small_onnx(tmp_path, options=options)
    engine = build_engine(onnx, rtx_backend(), NO_CACHE, tmp_path)
    heard = Heard()
    _check_refitted(engine, onnx, heard)
    assert heard.notes == [f"note: the engine was built but not run: {find_gpus().reason}"]


@pytest.mark.slow
def test_an_int8_engine_takes_no_float_checkpoint(tmp_path: Path) -> None:
    side = side_of(tmp_path, Precision.INT8, GraphOptions(32, 32))
    with pytest.raises(DeployError, match="come from a calibration"):
        export_for_refit(side, tmp_path / "new.pth", tmp_path, SILENT)
