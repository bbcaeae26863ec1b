"""Engines built, loaded, run and compared on a GPU, with each library that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_graphs import CLASSES, PIXELS, PREPROCESSING, make_net, narrow_spec, write_onnx

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.engine import BuildOptions, Engine, build_engine
from repvgg_deploy.engine.backends import Backend, import_backend
from repvgg_deploy.engine.checking import check_engine, check_where_possible, run_as_engine
from repvgg_deploy.engine.cuda import LIBRARIES, DeviceArray, open_cuda
from repvgg_deploy.engine.gpus import find_gpus
from repvgg_deploy.engine.inspection import convolution_precisions, inspect_engine
from repvgg_deploy.engine.loading import load_plan
from repvgg_deploy.engine.network import parse_onnx, read_convolution_precisions
from repvgg_deploy.engine.refit import refit_engine
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.onnx_export import GraphOptions
from repvgg_deploy.runners.engine_runner import load_engine, open_engine
from repvgg_deploy.runners.onnx_runner import OnnxRunner

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
def cuda(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        opened = open_cuda(request.param)
    except DeployError as error:
        pytest.skip(error.message)
    yield request.param
    opened.close()


def build(
    folder: Path, backend: Backend, precision: Precision = Precision.FP32, seed: int = 0, **options: object
) -> tuple[Path, Engine]:
    net = make_net(narrow_spec("A0"), seed)
    onnx = write_onnx(folder, net, precision, GraphOptions(PIXELS, PIXELS, **options))
    return onnx, build_engine(onnx, backend, RANGE, folder)


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, PIXELS, PIXELS)).astype(np.float32)


@pytest.mark.parametrize("precision", list(Precision))
def test_an_engine_agrees_with_its_graph(backend: Backend, cuda: str, precision: Precision, tmp_path: Path) -> None:
    onnx, engine = build(tmp_path, backend, precision)
    images = draw(8)
    with load_engine(engine.plan, cuda=cuda) as runner:
        assert (runner.backend, runner.precision) == (backend.name, str(precision))
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


def test_torch_tensors_and_streams_are_taken(backend: Backend, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
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
    runner = open_engine(engine.plan, cuda="cuda.bindings")
    with runner:
        for count in (2, 5, 2, 5):
            runner(draw(count))
        assert set(runner.lanes[0]._captured) <= {2, 5}
        if backend.name == "tensorrt":
            assert set(runner.lanes[0]._captured) == {2, 5}


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


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
@pytest.mark.parametrize("precision", list(Precision))
def test_onnx_runtime_runs_on_the_gpu(provider: str, precision: Precision, tmp_path: Path) -> None:
    onnx = write_onnx(tmp_path, make_net(narrow_spec("A0")), precision)
    images = draw(4)
    try:
        runner = OnnxRunner(onnx, provider)
    except DeployError as error:
        pytest.skip(error.message)
    expected = OnnxRunner(onnx).run(images)["logits"]
    np.testing.assert_allclose(runner.run(images)["logits"], expected, atol=5e-2 * np.abs(expected).max())
