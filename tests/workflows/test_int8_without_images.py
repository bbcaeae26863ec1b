"""`export --int8 --calib none` from the command line: calibrated on images synthesized from BN statistics."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import Result
from helpers.commands import NO_ENGINE, failed, object_of, run

from repvgg_deploy.files.places import data_folder
from repvgg_deploy.images.synthetic import write_image_folder

DEMO = data_folder("models") / "demo.safetensors"


@pytest.fixture
def quick_pictures(tmp_path) -> Path:
    """The recipe `fast` with fewer steps for each picture."""
    text = (data_folder("calibration") / "fast.toml").read_text(encoding="utf-8")
    path = tmp_path / "quick.toml"
    path.write_text(f"{text}\n[pictures]\ncount = 32\nsteps = 30\n", encoding="utf-8")
    return path


def without_images(recipe: Path, out: Path, *more: str | Path) -> Result:
    return run("export", DEMO, "--int8", "--calib", "none", "--recipe", recipe, *NO_ENGINE, "-o", out, *more)


@pytest.mark.exhaustive
def test_int8_without_images_says_so_everywhere(quick_pictures, tmp_path) -> None:
    result = without_images(quick_pictures, tmp_path / "a")
    words = "no images (32 images of 64x64, synthesized from BN statistics)"
    assert words in result.stdout
    assert "no calibration images: synthesizing images from the BN statistics" in result.stderr
    properties = {p.key: p.value for p in onnx.load(tmp_path / "a" / "demo.int8.onnx").metadata_props}
    about = json.loads(properties["repvgg_deploy.quantization"])
    assert about["calibrated_on"] == words
    assert about["images"] == 0
    assert about["pictures"]["steps"] == 30
    values = object_of(without_images(quick_pictures, tmp_path / "b", "--json"))
    assert values["quantization"]["images"] == 0
    assert values["quantization"]["calibrated_on"] == words
    # The same command gives the same file.
    assert (tmp_path / "a" / "demo.int8.onnx").read_bytes() == (tmp_path / "b" / "demo.int8.onnx").read_bytes()


@pytest.mark.slow
def test_a_deploy_form_needs_images(quick_pictures, tmp_path) -> None:
    fused, out = tmp_path / "fused.pth", tmp_path / "out"
    assert run("fuse", DEMO, "-o", fused).exit_code == 0
    result = run("export", fused, "--int8", "--calib", "none", "--recipe", quick_pictures, *NO_ENGINE, "-o", out)
    assert "error: the checkpoint is in deploy form: it has no BN statistics" in failed(result)
    assert "hint: give --calib DIR" in result.stderr
    assert not out.exists()


@pytest.mark.slow
def test_the_time_for_pictures_can_be_limited(quick_pictures, tmp_path) -> None:
    result = without_images(quick_pictures, tmp_path, "--calib-seconds", "0.5", "--calib-count", "128")
    assert result.exit_code == 0, result.output
    assert "warning: the time limit ended the synthesis after" in result.stderr
    assert "of 30 steps" in result.stderr


@pytest.mark.exhaustive
def test_without_images_the_demo_model_loses_half_a_point_at_most(tmp_path) -> None:
    assert without_images(Path("accurate"), tmp_path, "--calib-count", "64").exit_code == 0
    write_image_folder(tmp_path / "val", 1200, seed=12, size=64)
    models = (DEMO, tmp_path / "demo.int8.onnx")
    exact, rounded = (object_of(run("eval", m, "--data", tmp_path / "val", "--json"))["top1"] for m in models)
    assert rounded >= exact - 0.5
