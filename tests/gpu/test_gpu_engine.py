"""Engines built, loaded, run and compared on a GPU, with each library that is installed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engine_graphs import CLASSES, PIXELS, PREPROCESSING, make_net, narrow_spec, write_onnx
from helpers.whole_networks import Extractor
from helpers.wide_statistics import randomize

from repvgg_deploy import export_module
from repvgg_deploy.artifacts import Precision
from repvgg_deploy.engine import BuildOptions, Engine, build_engine
from repvgg_deploy.engine.backends import Backend, import_backend
from repvgg_deploy.engine.cuda.interface import LIBRARIES, DeviceArray, open_cuda
from repvgg_deploy.engine.inspection import convolution_precisions, inspect_engine
from repvgg_deploy.engine.loading import load_plan
from repvgg_deploy.engine.network import parse_onnx, read_convolution_precisions
from repvgg_deploy.engine.refit import refit_engine
from repvgg_deploy.engine.runner import load_engine, open_engine
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.hardware.gpus import find_gpus
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.verification.engine import check_engine, check_where_possible, run_as_engine

RANGE = BuildOptions(batch_range=(1, 4, 8))


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    found = import_backend(request.param)
    if not isinstance(found, Backend):
        pytest.skip(found.reason)
    if not found.supports(find_gpus().gpus[0]):
        pytest.skip(f"{found.label} does not list this GPU; see test_a_gpu_that_is_not_listed_is_named")
    return found


@pytest.fixture(params=LIBRARIES)
def cuda(request: pytest.FixtureRequest) -> str:
    require_cuda(request.param)
    return str(request.param)


def build(
    folder: Path, backend: Backend, precision: Precision = Precision.FP32, seed: int = 0, **options: object
) -> tuple[Path, Engine]:
    net = make_net(narrow_spec("A0"), seed)
    onnx = write_onnx(folder, net, precision, GraphOptions(PIXELS, PIXELS, **options))
    return onnx, build_engine(onnx, backend, RANGE, folder)


def require_cuda(library: str) -> None:
    try:
        open_cuda(library).close()
    except DeployError as error:
        pytest.skip(error.message)


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, PIXELS, PIXELS)).astype(np.float32)


@pytest.mark.parametrize("precision", list(Precision))
def test_an_engine_agrees_with_its_graph(backend: Backend, cuda: str, precision: Precision, tmp_path: Path) -> None:
    onnx, engine = build(tmp_path, backend, precision)
    images = draw(8)
    with load_engine(engine.plan, cuda=cuda) as runner:
        known = "tf32" if precision is Precision.FP32 else str(precision)
        assert (runner.backend, runner.precision) == (backend.name, known)
        parity = check_engine(runner, images, run_as_engine(onnx, images))
    assert parity.images == 8
    assert parity.cosine > 0.99


def test_the_check_after_a_build_runs_the_engine(backend: Backend, tmp_path: Path) -> None:
    onnx, engine = build(tmp_path, backend, Precision.FP16)
    images = draw(4)
    expected = OnnxRunner(onnx).run(images)
    parity = check_where_possible(engine, images, lambda: expected)
    assert parity is not None
    with pytest.raises(VerificationError):
        check_where_possible(engine, images, lambda: {"logits": expected["logits"][::-1]})


def test_pixels_go_in_and_the_best_classes_come_out(backend: Backend, cuda: str, tmp_path: Path) -> None:
    onnx, engine = build(tmp_path, backend, Precision.FP16, uint8_input=PREPROCESSING, topk=3)
    pixels = np.random.default_rng(0).integers(0, 256, (5, PIXELS, PIXELS, 3), dtype=np.uint8)
    with load_engine(engine.plan, cuda=cuda) as runner:
        check_engine(runner, pixels, run_as_engine(onnx, pixels))
        assert set(runner(pixels)) == {"scores", "classes"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_engine_of_a_whole_network_agrees_by_output(backend: Backend, precision: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch's exporter needs it")
    batches = [torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    result = export_module(
        randomize(Extractor()),
        batches[0],
        tmp_path / "net.onnx",
        precision=precision,
        calibration=batches if precision == "int8" else None,
        recipe="fast",
        engine=backend.name,
    )
    assert set(result.parity["engine"]) == set(result.outputs)


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("graphs", [False, True])
def test_any_number_of_images_is_cut_into_batches(
    backend: Backend, cuda: str, streams: int, graphs: bool, tmp_path: Path
) -> None:
    onnx, engine = build(tmp_path, backend)
    expected = OnnxRunner(onnx)
    with load_engine(engine.plan, cuda=cuda, streams=streams, graphs=graphs) as runner:
        # 8 is the largest batch; sizes come back, so that a graph that was captured before is replayed.
        for count in (1, 8, 3, 20, 8, 0, 1, 3):
            images = draw(count, seed=count)
            logits = runner(images)
            assert logits.shape == (count, CLASSES)
            if count:
                reference = expected.run(images)["logits"]
                np.testing.assert_allclose(logits, reference, atol=1e-2 * np.abs(reference).max())


def test_a_batch_below_the_smallest_is_filled_up(backend: Backend, tmp_path: Path) -> None:
    onnx = write_onnx(tmp_path, make_net(narrow_spec("A0")))
    engine = build_engine(onnx, backend, replace(RANGE, batch_range=(4, 4, 8)), tmp_path)
    with load_engine(engine.plan) as runner:
        one, four = runner(draw(1)), runner(np.concatenate([draw(1), draw(3, 1)]))
    np.testing.assert_allclose(one[0], four[0], rtol=1e-5)


def test_arrays_on_the_gpu_are_used_without_a_copy(backend: Backend, cuda: str, tmp_path: Path) -> None:
    _, engine = build(tmp_path, backend)
    images = draw(4)
    with load_engine(engine.plan, cuda=cuda) as runner:
        library = runner.cuda
        device = DeviceArray(library.allocate(images.nbytes), images.shape, images.dtype)
        stream = library.create_stream()
        library.copy_to_device(device.pointer, images, stream)
        outputs = runner.run_on_device(device, stream=stream)
        host = np.empty((4, CLASSES), np.float32)
        library.copy_to_host(host, outputs["logits"].pointer, stream)
        library.synchronize(stream)
        np.testing.assert_allclose(host, runner(images), rtol=1e-3, atol=1e-3 * np.abs(host).max())
        del outputs
        library.free(device.pointer)
        library.destroy_stream(stream)


def test_torch_tensors_and_streams_are_taken(backend: Backend, cuda_torch: Any, tmp_path: Path) -> None:
    torch = cuda_torch
    _, engine = build(tmp_path, backend)
    images = draw(4)
    with load_engine(engine.plan) as runner:
        stream = torch.cuda.Stream()
        given = torch.from_numpy(images).cuda()
        written = torch.empty((4, CLASSES), device="cuda")
        torch.cuda.synchronize()
        outputs = runner.run_on_device(given, {"logits": written}, stream)
        stream.synchronize()
        assert outputs["logits"].pointer == written.data_ptr()
        expected = runner(images)
        np.testing.assert_allclose(written.cpu().numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_without_a_stream_the_input_is_waited_for(backend: Backend, cuda_torch: Any, tmp_path: Path) -> None:
    torch = cuda_torch
    _, engine = build(tmp_path, backend)
    images = draw(4)
    with load_engine(engine.plan) as runner:
        expected = runner(images)
        given, wanted = torch.zeros(images.shape, device="cuda"), torch.from_numpy(images).cuda()
        runner(given)
        large = torch.ones((4096, 4096), device="cuda")
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            given.zero_()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                # Tens of milliseconds before the input is there.
                for _ in range(100):
                    large = (large @ large).clamp(max=1)
                given.copy_(wanted)
            outputs = runner.run_on_device(given)
            logits = torch.as_tensor(outputs["logits"], device="cuda").cpu().numpy()
            np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_inputs_that_do_not_fit_are_refused(backend: Backend, tmp_path: Path) -> None:
    _, engine = build(tmp_path, backend)
    with load_engine(engine.plan) as runner:
        with pytest.raises(DeployError, match="the engine takes"):
            runner(draw(2).astype(np.float16))
        with pytest.raises(DeployError, match="the engine takes"):
            runner(draw(2)[:, :, 1:])
    with pytest.raises(DeployError, match="was closed"):
        runner(draw(1))


def test_graphs_are_captured_once_a_batch_size(backend: Backend, tmp_path: Path) -> None:
    _, engine = build(tmp_path, backend)
    require_cuda("cuda.bindings")
    with open_engine(engine.plan, cuda="cuda.bindings") as runner:
        for count in (2, 5, 2, 5):
            runner(draw(count))
        (stream,) = runner.streams
        assert set(stream._prepared) == {2, 5}
        captured = {batch for batch, prepared in stream._prepared.items() if prepared.graph is not None}
        assert captured | set(stream.without_graph) == {2, 5}
        if backend.name == "tensorrt":
            assert captured == {2, 5}, stream.without_graph


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_graphs_of_several_batch_sizes_replay_what_they_captured(
    backend: Backend, precision: Precision, tmp_path: Path
) -> None:
    _, engine = build(tmp_path, backend, precision)
    images = draw(8)
    counts = (8, 3, 8, 1, 3, 8, 5, 1, 3, 5, 8) * 4
    with load_engine(engine.plan, graphs=False) as runner:
        plain = {count: runner(images[:count]) for count in set(counts)}
    with load_engine(engine.plan) as runner:
        for count in counts:
            np.testing.assert_allclose(runner(images[:count]), plain[count], atol=1e-2 * np.abs(plain[8]).max())


def test_more_batch_sizes_than_graphs(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, engine = build(tmp_path, backend)
    monkeypatch.setattr("repvgg_deploy.engine.stream.MAX_GRAPHS", 2)
    images = draw(8)
    reference = OnnxRunner(onnx).run(images)["logits"]
    with load_engine(engine.plan) as runner:
        for count in (1, 2, 3, 4, 3, 2, 1, 4) * 2:
            np.testing.assert_allclose(runner(images[:count]), reference[:count], atol=1e-2 * np.abs(reference).max())


def test_a_failed_capture_leaves_an_engine_that_runs(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_cuda("cuda.bindings")
    _, engine = build(tmp_path, backend)
    images = draw(3)
    with load_engine(engine.plan, graphs=False) as runner:
        plain = runner(images)
    with load_engine(engine.plan, cuda="cuda.bindings") as runner:
        end_capture = runner.cuda.end_capture

        def refuse(stream: int) -> None:
            runner.cuda.destroy_graph(end_capture(stream))
            raise DeployError("no graph today")

        monkeypatch.setattr(runner.cuda, "end_capture", refuse)
        for _ in range(3):
            np.testing.assert_allclose(runner(images), plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())
        assert set(runner.streams[0].without_graph) == {3}


def test_closing_gives_the_gpus_memory_back(backend: Backend, cuda: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    _, engine = build(tmp_path, backend)
    free = []
    held = []
    for _ in range(6):
        runner = open_engine(engine.plan, cuda=cuda, streams=2)
        runner(draw(20))
        runner.close()
        held.append(runner)
        free.append(torch.cuda.mem_get_info()[0])
    # The first rounds may load modules, which stay. A context alone is some MiB.
    assert free[2] - free[-1] < 4 << 20


def test_many_engines_are_closed_in_any_order_and_one_not_at_all(backend: Backend, cuda: str, tmp_path: Path) -> None:
    _, engine = build(tmp_path, backend)
    script = (
        "import sys, numpy as np\n"
        "from repvgg_deploy.engine.runner import open_engine\n"
        "runners = [open_engine(sys.argv[1], cuda=sys.argv[2]) for _ in range(3)]\n"
        f"images = np.ones((2, 3, {PIXELS}, {PIXELS}), np.float32)\n"
        "runners[0].close()\n"
        "runners[2](images)\n"
        "runners[2].close()\n"
        "print(runners[1](images).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(engine.plan), cuda], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"(2, {CLASSES})"
    assert "PyCUDA ERROR" not in done.stderr


@pytest.mark.parametrize("precision", list(Precision))
def test_the_engine_computes_convolutions_in_the_graphs_precision(
    backend: Backend, precision: Precision, tmp_path: Path
) -> None:
    onnx, engine = build(tmp_path, backend, precision, batch=4)
    report = inspect_engine(engine.plan)
    assert report.layers, report.why_no_layers
    if backend.name == "tensorrt-rtx":
        pytest.skip(f"TensorRT-RTX fuses into {len(report.layers)} layers that name no types of their own")
    wanted = read_convolution_precisions(backend, parse_onnx(backend, onnx).network)
    found = convolution_precisions(report.layers, tuple(wanted))
    assert found == wanted


def test_the_layers_of_a_dynamic_batch_have_precisions(backend: Backend, tmp_path: Path) -> None:
    _, engine = build(tmp_path, backend, Precision.FP16)
    report = inspect_engine(engine.plan)
    assert report.layers, report.why_no_layers
    if backend.name == "tensorrt-rtx":
        pytest.skip(f"TensorRT-RTX fuses into {len(report.layers)} layers that name no types of their own")
    assert "fp16" in {layer.precision for layer in report.layers}


@pytest.mark.parametrize("strip", [False, True])
def test_new_weights_go_into_a_refittable_engine(backend: Backend, strip: bool, tmp_path: Path) -> None:
    first = write_onnx(tmp_path, make_net(narrow_spec("A0"), 0), name="first")
    second = write_onnx(tmp_path, make_net(narrow_spec("A0"), 1), name="second")
    options = replace(RANGE, refittable=True, strip_weights=strip)
    engine = build_engine(first, backend, options, tmp_path)
    if strip:
        with pytest.raises(DeployError, match="built without weights"):
            load_plan(engine.plan)
    folder = tmp_path / "refitted"
    folder.mkdir()
    images = draw(4)
    for onnx in (second, first):
        refitted = refit_engine(engine.plan, onnx, folder)
        with load_engine(refitted.plan) as runner:
            check_engine(runner, images, run_as_engine(onnx, images))
    if refitted.side.options.needs_refit:
        # The sidecar says that a refitted engine takes weights once more.
        again = tmp_path / "again"
        again.mkdir()
        with load_engine(refit_engine(refitted.plan, second, again).plan) as runner:
            check_engine(runner, images, run_as_engine(second, images))


def test_a_gpu_that_is_not_listed_is_named(tmp_path: Path) -> None:
    found = import_backend("tensorrt-rtx")
    if not isinstance(found, Backend):
        pytest.skip(found.reason)
    gpu = find_gpus().gpus[0]
    if found.supports(gpu):
        pytest.skip(f"TensorRT-RTX supports the {gpu.name}")
    said = ""
    try:
        onnx, engine = build(tmp_path, found)
        with load_engine(engine.plan) as runner:
            images = draw(4)
            # Where it runs after all, it must compute the right thing.
            check_engine(runner, images, run_as_engine(onnx, images))
    except DeployError as error:
        said = error.message
    assert not said or (gpu.name in said and gpu.compute_capability in said)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_onnx_runtime_runs_on_the_gpu(precision: Precision, tmp_path: Path) -> None:
    onnx = write_onnx(tmp_path, make_net(narrow_spec("A0")), precision)
    try:
        runner = OnnxRunner(onnx, "CUDAExecutionProvider")
    except DeployError as error:
        pytest.skip(error.message)
    plain = OnnxRunner(onnx)
    # Each batch is a graph of its own, and none of them is another's.
    bound = {count: runner.bind(draw(count, count)) for count in (4, 1, 7)}
    for _ in range(3):
        for count, run in bound.items():
            run.upload()
            run.run()
            expected = plain.run(draw(count, count))["logits"]
            for found in (run.download()["logits"], runner.run(draw(count, count))["logits"]):
                np.testing.assert_allclose(found, expected, atol=5e-2 * np.abs(expected).max())
