"""`export --int8` and `export --engine` from the command line, on the embedded model and drawn images."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from helpers.quantized_nets import QUICK_RECIPE
from helpers.wide_statistics import narrow, randomize
from onnx import TensorProto
from PIL import Image

from repvgg_deploy.checkpoints.writing import name_state_dict
from repvgg_deploy.cli.main import main
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.array_files import save_arrays
from repvgg_deploy.quantization.qdq import with_fp16_scales
from repvgg_deploy.workflows import int8 as int8_export
from repvgg_deploy.workflows.evaluate import evaluate

DEMO = str(data_folder("models") / "demo.safetensors")
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "images"
    write_image_folder(folder, 96, seed=11, size=64)
    return folder


def export(*arguments: str | Path, code: int = 0):
    result = CliRunner().invoke(main, ["export", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def int8(images: Path, out: Path, *more: str | Path, code: int = 0):
    """INT8 with the fewest images and samples that still quantize well; `more` may name another recipe."""
    arguments = ("--int8", "--calib", images, "--recipe", QUICK_RECIPE, "--engine", "none", "-o", out)
    return export(DEMO, *arguments, *more, code=code)


@pytest.mark.slow
def test_int8_is_one_command(images, tmp_path) -> None:
    values = json.loads(int8(images, tmp_path, "--json").stdout)
    assert list(values["parity"]) == ["fused", "quantized", "onnx"]
    assert values["parity"]["onnx"]["top1_agreement"] == 100.0
    assert values["quantization"]["images"] == 96
    assert values["quantization"]["kept_float"] == []
    assert values["quantization"]["warnings"] == []
    assert [p.name for p in tmp_path.iterdir()] == ["demo.int8.onnx"]


@pytest.mark.exhaustive
def test_every_kernel_is_int8_and_the_file_a_quarter_of_fp32(images, tmp_path) -> None:
    int8(images, tmp_path)
    export(DEMO, "--engine", "none", "-o", tmp_path)
    graph = onnx.load(tmp_path / "demo.int8.onnx").graph
    kernels = {w.name: w.data_type for w in graph.initializer if len(w.dims) in (2, 4)}
    assert len(kernels) == 11
    assert set(kernels.values()) == {TensorProto.INT8}
    sizes = [(tmp_path / f"demo.{p}.onnx").stat().st_size for p in ("int8", "fp32")]
    assert sizes[0] < 0.3 * sizes[1]


@pytest.mark.exhaustive
def test_accuracy_on_unseen_images_survives(images, tmp_path) -> None:
    int8(images, tmp_path, "--recipe", "fast")
    write_image_folder(tmp_path / "val", 600, seed=12, size=64)
    accuracy = {}
    for model in (DEMO, tmp_path / "demo.int8.onnx"):
        result = CliRunner().invoke(main, ["eval", str(model), "--data", str(tmp_path / "val"), "--json"])
        accuracy[str(model)] = json.loads(result.stdout)["top1"]
    trained, quantized = accuracy.values()
    assert quantized >= trained - 1.0


@pytest.mark.slow
def test_the_metadata_name_recipe_images_and_seed(images, tmp_path) -> None:
    int8(images, tmp_path, "--recipe", "fast")
    properties = {p.key: p.value for p in onnx.load(tmp_path / "demo.int8.onnx").metadata_props}
    about = json.loads(properties["repvgg_deploy.quantization"])
    assert about["recipe"] == "fast"
    assert about["images"] == 96
    assert len(about["images_sha256"]) == 64
    assert about["seed"] == 0


@pytest.mark.exhaustive
def test_the_same_images_give_the_same_file(images, tmp_path) -> None:
    int8(images, tmp_path / "a")
    int8(images, tmp_path / "b")
    assert (tmp_path / "a" / "demo.int8.onnx").read_bytes() == (tmp_path / "b" / "demo.int8.onnx").read_bytes()


@pytest.mark.slow
def test_a_list_of_files_calibrates_like_the_folder(images, tmp_path) -> None:
    paths = sorted(images.rglob("*.png"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)), encoding="utf-8")
    int8(images, tmp_path / "a")
    int8(tmp_path / "list.txt", tmp_path / "b")
    assert (tmp_path / "a" / "demo.int8.onnx").read_bytes() == (tmp_path / "b" / "demo.int8.onnx").read_bytes()


@pytest.mark.slow
def test_few_images_are_warned_of_and_none_is_an_error(images, tmp_path) -> None:
    result = int8(images, tmp_path / "few", "--calib-count", "8")
    assert "warning: 8 calibration images are few" in result.stderr
    (tmp_path / "empty").mkdir()
    result = int8(tmp_path / "empty", tmp_path / "none", code=1)
    assert "error: --calib: there is no image" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_nearly_identical_images_are_warned_of_once_and_in_json(images, tmp_path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.asarray(Image.open(next(images.rglob("*.png"))).convert("RGB"), np.float32)
    generator = np.random.default_rng(0)
    for index in range(40):
        noisy = (pixels + generator.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index}.png")
    result = int8(folder, tmp_path / "out", "--json", "--quiet")
    (warning,) = json.loads(result.stdout)["quantization"]["warnings"]
    assert "the 40 calibration images are nearly identical (1 distinct)" in warning
    assert result.stderr.count("warning: ") == 1
    assert f"warning: {warning}" in result.stderr.replace("\n", " ")


@pytest.mark.slow
def test_broken_calibration_images_are_named_and_left_out(images, tmp_path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, path in enumerate(sorted(images.rglob("*.png"))[:40]):
        (folder / f"{index}.png").write_bytes(path.read_bytes() if index else b"no image")
    values = int8(folder, tmp_path / "out", "--json")
    assert json.loads(values.stdout)["quantization"]["images"] == 39
    assert "0.png" in values.stderr


@pytest.mark.exhaustive
def test_the_statistics_cache_belongs_to_one_checkpoint_and_its_images(images, tmp_path) -> None:
    cache = tmp_path / "demo.npz"
    int8(images, tmp_path / "a", "--calib-cache", cache)
    written = cache.read_bytes()
    int8(images, tmp_path / "b", "--calib-cache", cache)
    assert (tmp_path / "a" / "demo.int8.onnx").read_bytes() == (tmp_path / "b" / "demo.int8.onnx").read_bytes()
    torch.save(name_state_dict(randomize(RepVGG(narrow("A0").spec(7))), "official"), tmp_path / "other.pth")
    arguments = ("--int8", "--calib", images, "--calib-cache", cache, "--size", "32", "--engine", "none")
    arguments = (*arguments, "--recipe", "fast")
    result = export(tmp_path / "other.pth", *arguments, "-o", tmp_path / "c", code=1)
    assert "another checkpoint" in result.stderr
    for other in (("--calib-count", "40"), ("--size", "32"), ("--mean", "0.5,0.5,0.5")):
        result = int8(images, tmp_path / "d", "--calib-cache", cache, *other, code=1)
        assert "belongs to other images" in result.stderr
    assert cache.read_bytes() == written


def test_a_cache_that_cannot_fit_is_told_of_before_anything_is_read(tmp_path) -> None:
    cache = tmp_path / "cache.npz"
    about = {"images": 8, "augmentations": 3, "sha256": "0" * 64, "images_sha256": "0" * 64}
    save_arrays(cache, about, {})
    arguments = ("--int8", "--calib", tmp_path / "none", "--calib-cache", cache, "--recipe", "fast", "--engine", "none")
    result = export(tmp_path / "none.pth", *arguments, "-o", tmp_path / "out", code=1)
    assert "is of 3 augmentations of each image, but the recipe takes 1" in result.stderr
    save_arrays(cache, {**about, "augmentations": 1, "images": -1}, {})
    result = export(tmp_path / "none.pth", *arguments, "-o", tmp_path / "out", code=1)
    assert "images: Expected `int` >= 1" in result.stderr
    cache.write_bytes(b"PK")
    assert "truncated or damaged" in export(tmp_path / "none.pth", *arguments, "-o", tmp_path / "out", code=1).stderr


@pytest.mark.slow
def test_a_layer_that_is_named_stays_float(images, tmp_path) -> None:
    values = json.loads(int8(images, tmp_path, "--keep-float", "stages.1.1", "--json").stdout)
    assert values["quantization"]["kept_float"] == ["stages.1.1"]
    kernels = {w.name: w.data_type for w in onnx.load(tmp_path / "demo.int8.onnx").graph.initializer}
    assert kernels["stages.1.1.conv.weight"] == TensorProto.FLOAT
    assert "no layer is called" in int8(images, tmp_path / "x", "--keep-float", "stages.9.9", code=1).stderr


@pytest.mark.slow
def test_what_stays_float_can_be_fp16(images, tmp_path) -> None:
    int8(images, tmp_path, "--rest", "fp16")
    types = {w.data_type for w in onnx.load(tmp_path / "demo.int8.onnx").graph.initializer}
    assert types == {TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT16}


@pytest.mark.slow
def test_the_layer_table_has_a_row_a_layer(images, tmp_path) -> None:
    lines = int8(images, tmp_path, "--layers").stdout.splitlines()
    assert sum(line.startswith(("stages.", "classifier")) for line in lines) == 11


@pytest.mark.parametrize(
    "arguments",
    [
        ("--int8",),
        ("--calib", "x"),
        ("--activation-type", "int8"),
        ("--full-range",),
        ("--recipe", "fast"),
        ("--layers",),
        ("--fp16", "--int8", "--calib", "x"),
        ("--int8", "--calib", "x", "--max-drop", "1"),
        ("--int8", "--calib", "x", "--calib-seconds", "9"),
        ("--calib", "none"),
    ],
    ids=" ".join,
)
def test_options_that_contradict_each_other_are_wrong_usage(arguments, tmp_path) -> None:
    export(DEMO, *arguments, "-o", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_export_ends_with_an_engine(precision, images, tmp_path) -> None:
    options = {"fp32": (), "fp16": ("--fp16",), "int8": ("--int8", "--calib", images, "--recipe", "fast")}[precision]
    arguments = (*options, "--engine", "tensorrt-rtx", "--batch-range", "1", "4", "8", "-o", tmp_path, "--json")
    values = json.loads(export(DEMO, *arguments).stdout)
    assert Path(values["engine"]) == tmp_path / f"demo.{precision}.plan"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"demo.{precision}.{e}" for e in ("onnx", "plan", "plan.json")
    ]
    side = json.loads((tmp_path / f"demo.{precision}.plan.json").read_text(encoding="utf-8"))
    assert side["profile"] == [1, 4, 8]
    assert side["convolutions"] == {precision: 10}


def test_a_missing_backend_is_an_error_before_any_work(tmp_path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    result = export(tmp_path / "no such checkpoint.pth", "--engine", "tensorrt", "-o", tmp_path / "out", code=1)
    assert "error: TensorRT is not installed" in result.stderr
    assert "hint: " in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quantized_logits_are_those_of_onnx_runtime(images, tmp_path) -> None:
    parity = json.loads(int8(images, tmp_path, "--json", "--uint8-input").stdout)["parity"]
    assert parity["onnx"]["relative"] < 1e-5
    assert 0.001 < parity["quantized"]["relative"] < 0.2
    assert np.isfinite(parity["quantized"]["cosine"])


@pytest.mark.slow
def test_a_limit_on_the_drop_keeps_as_few_layers_in_float_as_it_takes(images, tmp_path) -> None:
    write_image_folder(tmp_path / "val", 240, seed=12, size=64)
    loose = int8(images, tmp_path / "a", "--val", tmp_path / "val", "--max-drop", "50", "--json")
    assert json.loads(loose.stdout)["quantization"]["kept_float"] == []
    assert "0 layers in float: top-1 drops by" in loose.stderr


@pytest.mark.slow
def test_layers_named_to_stay_float_do_so_in_every_candidate(images, tmp_path) -> None:
    write_image_folder(tmp_path / "val", 24, seed=12, size=64)
    limit = ("--val", tmp_path / "val", "--max-drop", "50", "--rest", "fp16")
    values = json.loads(int8(images, tmp_path / "a", *limit, "--keep-float", "stages.1.1", "--json").stdout)
    assert values["quantization"]["kept_float"] == ["stages.1.1"]
    result = int8(images, tmp_path / "b", *limit, "--keep-float", "stages.9.9", code=1)
    assert "no layer is called" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_the_drop_is_that_of_the_file_with_its_scales(rest, images, tmp_path, monkeypatch) -> None:
    rounded = []

    def round_scales(net):
        rounded.append(with_fp16_scales(net))
        return rounded[-1]

    monkeypatch.setattr(int8_export, "with_fp16_scales", round_scales)
    write_image_folder(tmp_path / "val", 24, seed=12, size=64)
    int8(images, tmp_path / "a", "--val", tmp_path / "val", "--max-drop", "50", "--rest", rest)
    assert len(rounded) == (1 if rest == "fp16" else 0)


@pytest.mark.slow
def test_an_unreadable_folder_is_told_of_with_a_cache_too(images, tmp_path) -> None:
    int8(images, tmp_path / "a", "--calib-cache", tmp_path / "cache.npz")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    result = int8(tmp_path / "broken", tmp_path / "b", "--calib-cache", tmp_path / "cache.npz", code=1)
    assert "none of the calibration images can be read" in result.stderr


@pytest.mark.slow
def test_a_drop_that_no_set_of_float_layers_mends_is_refused(images, tmp_path, monkeypatch) -> None:
    """The fused net is measured first, and as it is; every quantized one ten points too low."""
    write_image_folder(tmp_path / "val", 24, seed=12, size=64)
    measured = []

    def lose_ten_points(model, validation):
        measured.append(evaluate(model, validation))
        return replace(measured[0], top1=measured[0].top1 - 10) if measured[1:] else measured[0]

    monkeypatch.setattr(int8_export, "evaluate", lose_ten_points)
    out = tmp_path / "out"
    arguments = ("--calib-count", "4", "--val", tmp_path / "val", "--max-drop", "5", "--json")
    result = int8(images, out, *arguments, code=3)
    assert "error: top-1 drops by 10.00 points, more than 5" in result.stderr
    assert len(measured) > 2
    assert "hint:" in result.stderr
    assert not out.exists()


@pytest.mark.slow
def test_int8_zero_points_are_for_old_releases_of_tensorrt(images, tmp_path) -> None:
    result = json.loads(
        int8(images, tmp_path, "--activation-type", "int8", "--opset", "13", "--engine", "none", "--json").stdout
    )
    # A float convolution stands where ONNX Runtime has an integer one: a code in a thousand may round the other way.
    assert result["parity"]["onnx"]["relative"] < 0.02
    (path,) = tmp_path.glob("*.int8.onnx")
    model = onnx.load(path)
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {item.data_type for item in model.graph.initializer if item.name in zeros} == {onnx.TensorProto.INT8}
    assert model.opset_import[0].version == 13
    about = json.loads({item.key: item.value for item in model.metadata_props}["repvgg_deploy.quantization"])
    assert about["activation_type"] == "int8"
    assert about["largest_pair_sum"] <= 32767


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_quantizing_on_a_gpu_needs_one(images, tmp_path) -> None:
    result = int8(images, tmp_path, "--calib-device", "cuda", code=1)
    assert "error: --calib-device cuda: torch sees no CUDA GPU here" in result.output
    assert not list(tmp_path.iterdir())


def test_where_to_quantize_is_for_int8(tmp_path) -> None:
    result = export(DEMO, "--calib-device", "cuda", "-o", tmp_path, code=2)
    assert "--calib-device is for --int8" in result.output
