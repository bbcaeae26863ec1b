"""`qat` from the command line: a checkpoint to train, the checkpoint and scales that come out, and runs that go on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.qat_commands import DEMO, SHORT, export_with, qat, run
from helpers.quantized_nets import QUICK_RECIPE
from helpers.small_nets import NETS, make_net, name_in_layout
from safetensors.torch import load_file

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.engine.building import require_signed_range
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.graphs.metadata import read_metadata
from repvgg_deploy.graphs.serialization import read_onnx_metadata
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.images.synthetic import draw_images, write_image_folder
from repvgg_deploy.quantization.qat_scales import load_scales
from repvgg_deploy.quantization.qat_training import TrainingOptions
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.verification.engine import run_as_engine
from repvgg_deploy.workflows import qat_images
from repvgg_deploy.workflows.qat import run_qat
from repvgg_deploy.workflows.qat_request import QatRequest, state_path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "images"
    write_image_folder(folder, 48, seed=11, size=64)
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_from_a_checkpoint_to_an_int8_graph_as_accurate_as_the_trained_net(form, images, tmp_path) -> None:
    source, more = DEMO, ()
    if form == "deploy":
        source, more = tmp_path / "fused.pth", ("--from-deploy",)
        run("fuse", DEMO, "-o", source)
    write_image_folder(tmp_path / "val", 240, seed=12, size=64)
    out = tmp_path / "trained.safetensors"
    values = json.loads(qat(source, images, out, *more, "--val", tmp_path / "val", "--json").stdout)
    assert load_checkpoint(out).form == form
    assert values["steps"] == 4
    # An activation between two integers can round either way, which decides an image that lies between two classes.
    assert values["parity"]["relative"] < 0.02
    assert values["parity"]["top1_agreement"] >= 95.0
    written = json.loads(export_with(out, tmp_path / "trained.scales.npz", tmp_path / "out", "--json").stdout)
    assert written["quantization"]["calibrated_on"] == "scales that qat learned in 4 steps"
    result = run("eval", tmp_path / "out" / "trained.int8.onnx", "--data", tmp_path / "val", "--json")
    trained = json.loads(run("eval", DEMO, "--data", tmp_path / "val", "--json").stdout)["top1"]
    (kept,) = (row for row in [values["start"], *values["rows"]] if row["step"] == values["best_step"])
    assert json.loads(result.stdout)["top1"] == pytest.approx(kept["val_top1"], abs=0.1)
    assert json.loads(result.stdout)["top1"] >= trained - 1.0


@pytest.mark.slow
def test_the_curves_are_a_table_and_a_picture(images, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    qat(DEMO, images, tmp_path / "trained.pth")
    with (tmp_path / "trained.curves.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0]["loss"] == ""
    assert all(float(row["loss"]) > 0 for row in rows[1:])
    assert all(0 <= float(row["held_out_agreement"]) <= 100 for row in rows)
    assert (tmp_path / "trained.curves.png").read_bytes().startswith(b"\x89PNG")
    assert not state_path(tmp_path / "trained.pth").exists()


@pytest.mark.slow
def test_a_run_that_only_makes_it_worse_gives_the_start_back(images, tmp_path) -> None:
    values = json.loads(qat(DEMO, images, tmp_path / "trained.pth", "--rate", "100", "--json").stdout)
    assert values["best_step"] == 0
    assert values["rows"][-1]["held_out_divergence"] > 10 * values["start"]["held_out_divergence"]
    trained, before = (
        json.loads(run("eval", checkpoint, "--data", images, "--json").stdout)["top1"]
        for checkpoint in (tmp_path / "trained.pth", DEMO)
    )
    assert trained >= before - 5


class Stop:
    """Ends the work at one of its steps, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def note(self, text: str, /) -> None:
        pass

    def step(self, name: str, done: float, total: float, /) -> None:
        if name == "training" and done == self.at and done < total:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_signal_after_the_state_was_saved_ends_the_run_at_once(images, tmp_path) -> None:
    out = tmp_path / "trained.safetensors"
    command = [sys.executable, "-m", "repvgg_deploy", "qat", DEMO, "--data", images, "--calib", images, "-o", out]
    more = ("--recipe", QUICK_RECIPE, "--steps", "100000", "--batch", "8", "--interval", "0")
    process = subprocess.Popen([*map(str, (*command, *more))], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not state_path(out).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert told.rstrip().endswith("Aborted!")
    # A whole state to go on from, and nothing else.
    assert [path.name for path in tmp_path.iterdir()] == [state_path(out).name]
    torch.load(state_path(out), weights_only=True)


def request_for(images: Path, out: Path) -> QatRequest:
    training = TrainingOptions(steps=4, batch=8)
    return QatRequest(DEMO, out, images, images, training, recipe=QUICK_RECIPE, interval_s=0.0)


@pytest.mark.exhaustive
def test_a_stopped_run_goes_on_and_ends_as_it_would_have(images, tmp_path) -> None:
    whole, stopped = (tmp_path / name / "trained.safetensors" for name in ("whole", "stopped"))
    run_qat(request_for(images, whole))
    with pytest.raises(KeyboardInterrupt):
        run_qat(request_for(images, stopped), Stop(3))
    assert not stopped.exists()
    assert state_path(stopped).exists()
    result = run_qat(replace(request_for(images, stopped), strict=True))
    assert result is not None
    assert result.resumed_at == 2
    for name in ("trained.safetensors", "trained.curves.csv"):
        assert (whole.parent / name).read_bytes() == (stopped.parent / name).read_bytes()
    sha256 = load_checkpoint(whole).sha256
    first, second = (load_scales(path.parent / "trained.scales.npz", sha256) for path in (whole, stopped))
    assert first is not None
    assert second is not None
    assert first[0].pool == second[0].pool
    for name, layer in first[0].layers.items():
        assert torch.equal(layer.weight, second[0].layers[name].weight)
        assert layer.input == second[0].layers[name].input


@pytest.mark.slow
def test_a_state_of_other_settings_is_not_taken(images, tmp_path) -> None:
    request = request_for(images, tmp_path / "trained.pth")
    with pytest.raises(KeyboardInterrupt):
        run_qat(request, Stop(2))
    with pytest.raises(DeployError, match="belongs to another run"):
        run_qat(replace(request, training=replace(request.training, rate=0.5)))
    shutil.copytree(images, tmp_path / "images")
    request = replace(request, data=tmp_path / "images", output=tmp_path / "other.pth")
    with pytest.raises(KeyboardInterrupt):
        run_qat(request, Stop(2))
    recipe = tmp_path / "own.toml"
    recipe.write_bytes(Path(QUICK_RECIPE).read_bytes())
    own = replace(request, recipe=recipe, output=tmp_path / "own.pth")
    with pytest.raises(KeyboardInterrupt):
        run_qat(own, Stop(2))
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("count = 512", "count = 500"), encoding="utf-8")
    with pytest.raises(DeployError, match="belongs to another run: other settings"):
        run_qat(own)
    next(request.data.rglob("*.png")).unlink()
    with pytest.raises(DeployError, match="belongs to another run: other settings, images or checkpoint"):
        run_qat(request)


@pytest.mark.slow
def test_images_too_many_to_keep_are_named_when_they_are_met_broken(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(qat_images, "_KEPT_BYTES", 0)
    shutil.copytree(images, tmp_path / "images")
    bad = sorted((tmp_path / "images").rglob("*.png"))[5]
    bad.write_bytes(b"no image")
    out = tmp_path / "trained.pth"
    assert f"left out: {bad} is not an image" in qat(DEMO, tmp_path / "images", out).stderr
    assert f"error: {bad} is not an image" in qat(DEMO, tmp_path / "images", out, "--strict", code=1).stderr


@pytest.mark.slow
def test_a_file_that_is_no_state_is_told_of_and_kept(images, tmp_path) -> None:
    request = request_for(images, tmp_path / "trained.pth")
    state_path(request.output).write_bytes(b"no state")
    with pytest.raises(DeployError, match="is not the saved state of a run"):
        run_qat(request)
    assert state_path(request.output).read_bytes() == b"no state"


@pytest.mark.exhaustive
@pytest.mark.parametrize("batch", ["8", "3"])
def test_two_processes_train_as_one_does(batch, images, tmp_path) -> None:
    arguments = ["qat", DEMO, "--data", images, "--calib", images, "--recipe", "fast", "--steps", "2", "--batch", batch]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "repvgg_deploy", *map(str, arguments), "-o", str(tmp_path / "two.pth"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Only the first process says what came of it.
    two = json.loads(done.stdout)
    one = json.loads(run(*map(str, arguments), "-o", tmp_path / "one.pth", "--json").stdout)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01)
    nets = [build(load_checkpoint(tmp_path / f"{name}.pth")) for name in ("one", "two")]
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 64, 64), dtype=np.float32))
    first, second = (net(pixels) for net in nets)
    assert float((first - second).norm() / first.norm()) < 0.02


@pytest.mark.slow
def test_made_pictures_take_the_place_of_images(tmp_path) -> None:
    text = (data_folder("calibration") / "fast.toml").read_text(encoding="utf-8")
    (tmp_path / "quick.toml").write_text(f"{text}\n[pictures]\ncount = 32\nsteps = 10\n", encoding="utf-8")
    out = tmp_path / "trained.pth"
    arguments = (DEMO, "--data", "none", "--calib", "none", "-o", out, "--recipe", tmp_path / "quick.toml")
    result = run("qat", *arguments, "--steps", "2", "--batch", "8")
    assert "no images to train on: synthesizing images from the BN statistics" in result.stderr
    assert out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", NETS)
def test_a_net_of_any_library_is_trained_and_read_again(layout, images, tmp_path) -> None:
    torch.save(name_in_layout(make_net(**NETS[layout]), layout), tmp_path / "net.pth")
    before = load_checkpoint(tmp_path / "net.pth")
    out = tmp_path / "trained.safetensors"
    qat(tmp_path / "net.pth", images, out, "--size", "32")
    after = load_checkpoint(out)
    assert after.spec == before.spec
    # The official layout has names for all that OpenMMLab's nets consist of.
    assert after.layout == (before.layout if layout != "openmmlab" else "official")
    export_with(out, tmp_path / "trained.scales.npz", tmp_path / "out", "--size", "32")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["--data", "--calib", "--val"])
def test_strict_an_image_that_cannot_be_read_is_an_error_before_any_training(where, images, tmp_path) -> None:
    folder, out = tmp_path / "images", tmp_path / "trained.pth"
    write_image_folder(folder, 32, seed=1, size=64)
    bad = next(folder.iterdir()) / "bad.png"
    bad.write_bytes(b"no image")
    folders = {"--data": images, "--calib": images, "--val": images, where: folder}
    arguments = [word for option, path in folders.items() for word in (option, path)]
    result = run("qat", DEMO, *arguments, "-o", out, *SHORT, "--strict", code=1)
    assert f"error: {bad} is not an image" in result.stderr
    assert "leave --strict out" in result.stderr
    assert not out.exists()
    assert not state_path(out).exists()


@pytest.mark.slow
def test_the_full_range_is_for_engines_that_have_it(images, tmp_path) -> None:
    out, scales = tmp_path / "trained.pth", tmp_path / "trained.scales.npz"
    qat(DEMO, images, out, "--full-range")
    refused = export_with(out, scales, tmp_path / "a", "--activation-type", "int8", code=1)
    assert "activations up to 255, and TensorRT saturates at 127" in refused.stderr
    assert not (tmp_path / "a").exists()
    export_with(out, scales, tmp_path / "b")
    graph = tmp_path / "b" / "trained.int8.onnx"
    # What an engine would compute from it is far from what was trained.
    pixels = normalize(draw_images(32, 13)[0], Preprocessing(64, 64, 64))
    answers = [next(iter(found.values())) for found in (OnnxRunner(graph).run(pixels), run_as_engine(graph, pixels))]
    exact = build(load_checkpoint(DEMO)).eval()(torch.from_numpy(pixels)).detach().numpy()
    errors = [np.linalg.norm(answer - exact) / np.linalg.norm(exact) for answer in answers]
    assert errors[0] < 0.5 * errors[1]
    with pytest.raises(GraphError, match="go up to 255"):
        require_signed_range(graph, read_metadata(read_onnx_metadata(graph)))


@pytest.mark.slow
def test_without_a_relu_the_full_range_is_the_only_one(images, tmp_path) -> None:
    out, scales = tmp_path / "trained.safetensors", tmp_path / "trained.scales.npz"
    qat(DEMO, images, out, "--full-range", "--act", "silu")
    for more in ((), ("--full-range",)):
        export_with(out, scales, tmp_path / "out", *more)


@pytest.mark.slow
def test_a_recipe_may_have_the_full_range(images, tmp_path) -> None:
    recipe, out = tmp_path / "full.toml", tmp_path / "trained.pth"
    recipe.write_text("full_range = true\n" + Path(QUICK_RECIPE).read_text(encoding="utf-8"), encoding="utf-8")
    qat(DEMO, images, out, "--recipe", recipe)
    scales, _ = load_scales(tmp_path / "trained.scales.npz", load_checkpoint(out).sha256)
    assert scales.full_range


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_net_whose_settings_no_tensor_tells_is_exported_as_it_was_trained(ending, images, tmp_path) -> None:
    settings = {"strides": [1, 1, 2, 2, 2], "activation": "SiLU", "mean": [0.4] * 3, "std": [0.2] * 3}
    torch.save({"state_dict": load_file(DEMO), "hyper_parameters": settings}, tmp_path / "net.ckpt")
    out = tmp_path / f"trained.{ending}"
    qat(tmp_path / "net.ckpt", images, out, "--size", "32")
    more = ("--size", "32")
    if ending == "pth":
        # It has no place for them. Without them it would be another net.
        refused = export_with(out, tmp_path / "trained.scales.npz", tmp_path / "out", *more, code=1).stderr
        assert "learned for another net or other images: strides 1,1,2,2,2, activation silu, mean" in refused
        more += tuple(refused.rpartition("hint: ")[2].split())
    export_with(out, tmp_path / "trained.scales.npz", tmp_path / "out", *more)
    about = read_metadata(read_onnx_metadata(tmp_path / "out" / "trained.int8.onnx"))
    assert about.preprocessing.mean == (0.4, 0.4, 0.4)
    assert [about.extra["assumed"][name]["value"] for name in ("strides", "activation")] == [[1, 1, 2, 2, 2], "silu"]


@pytest.mark.slow
def test_scales_are_those_of_their_checkpoint(images, tmp_path) -> None:
    out, scales = tmp_path / "trained.pth", tmp_path / "trained.scales.npz"
    qat(DEMO, images, out)
    assert "another checkpoint" in export_with(DEMO, scales, tmp_path / "a", code=1).stderr
    (tmp_path / "no.npz").write_bytes(b"no scales")
    assert "truncated or damaged" in export_with(out, tmp_path / "no.npz", tmp_path / "a", code=1).stderr
    refused = export_with(out, scales, tmp_path / "a", "--keep-float", "stages.1.1", code=1)
    assert "every layer was trained in INT8" in refused.stderr
    for features in ((), ("2,3",)):
        export_with(out, scales, tmp_path / "features", "--features", *features)
    assert OnnxRunner(tmp_path / "features" / "trained.int8.onnx").run(np.zeros((1, 3, 64, 64), np.float32)).keys() == {
        "stage2",
        "stage3",
    }
    refused = export_with(out, scales, tmp_path / "a", "--act", "silu", "--mean", "0.5,0.5,0.5", code=1)
    assert "were learned for another net or other images: activation relu, mean" in refused.stderr
    assert "hint: --act relu --mean" in refused.stderr
    assert not (tmp_path / "a").exists()
