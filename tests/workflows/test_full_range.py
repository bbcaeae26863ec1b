"""`export --int8 --full-range`: activations up to 255, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import Result
from helpers.commands import NO_ENGINE, failed, object_of, run
from helpers.quantized_nets import QUICK_RECIPE
from onnx import numpy_helper

from repvgg_deploy.engine.options import BuildOptions
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.workflows import export as export_workflow


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "images"
    write_image_folder(folder, 96, seed=11, size=64)
    return folder


def int8(images: Path, out: Path, *more: str | Path) -> Result:
    demo = data_folder("models") / "demo.safetensors"
    return run("export", demo, "--int8", "--calib", images, "--recipe", QUICK_RECIPE, *NO_ENGINE, "-o", out, *more)


@pytest.mark.slow
def test_with_the_full_range_activations_are_finer_and_the_file_says_so(images, tmp_path) -> None:
    files, errors = [], []
    for options in ((), ("--full-range",)):
        out = tmp_path / f"{len(files)}"
        values = object_of(int8(images, out, *options, "--json"))
        (path,) = out.iterdir()
        files.append(onnx.load(path))
        errors.append(values["parity"]["quantized"]["relative"])
    assert errors[1] < 0.9 * errors[0]
    narrow, wide = (activation_scales(file) for file in files)
    assert len(narrow) > 5
    # The images' own integers are signed or all in use: nothing changes for them.
    assert [name for name in narrow if wide[name] >= 0.8 * narrow[name]] == [next(iter(narrow))]
    about = [json.loads({p.key: p.value for p in f.metadata_props}["repvgg_deploy.quantization"]) for f in files]
    assert [found.get("full_range", False) for found in about] == [False, True]
    assert about[1]["largest_pair_sum"] <= 32767


def activation_scales(model: onnx.ModelProto) -> dict[str, float]:
    """The scales of the activations, by name, in the order of the graph."""
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    found = [node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return {name: float(values[name]) for name in found if not values[name].shape}


def test_the_full_range_is_refused_for_engines_and_for_int8_before_anything_is_read(tmp_path, monkeypatch) -> None:
    arguments = ("export", "missing.pth", "--int8", "--calib", "none", "--full-range", "-o", tmp_path / "out")
    assert "--full-range is for uint8" in failed(run(*arguments, *NO_ENGINE, "--activation-type", "int8"))
    monkeypatch.setattr(export_workflow, "choose_backend", lambda *_: object())
    monkeypatch.setattr(BuildOptions, "check", lambda *_: None)
    refused = failed(run(*arguments, "--engine", "tensorrt-rtx"))
    assert "activations go up to 255, and TensorRT saturates at 127" in refused
    # Where any engine would do, none is built.
    result = run(*arguments)
    assert "there is no file missing.pth" in failed(result)
    assert "no engine will be built: activations up to 255" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_recipe_may_have_the_full_range(images, tmp_path) -> None:
    recipe = tmp_path / "full.toml"
    recipe.write_text("full_range = true\n" + Path(QUICK_RECIPE).read_text(encoding="utf-8"), encoding="utf-8")
    for out, options in ((tmp_path / "a", ("--full-range",)), (tmp_path / "b", ("--recipe", recipe))):
        assert int8(images, out, *options).exit_code == 0
    first, second = (onnx.load(next((tmp_path / name).iterdir())) for name in "ab")
    assert first.graph == second.graph
