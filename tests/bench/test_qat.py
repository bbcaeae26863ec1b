"""The benchmarks of INT8 without images and of training for it: they run on a small net and write their records."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import data_free
import pytest
import qat
import torch

from repvgg_deploy.files.places import data_folder
from repvgg_deploy.images.synthetic import write_image_folder

DEMO = data_folder("models") / "demo.safetensors"
FIGURES = {"top1", "top1_fp32", "agreement", "sqnr_db", "median_db", "images"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "images"
    write_image_folder(folder, 36, seed=5, size=64)
    return folder


def run(script, monkeypatch, pictures: Path, output: Path, *arguments: str) -> dict:
    common = ["--checkpoint", str(DEMO), "--calib", str(pictures), "--val", str(pictures), "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, *common])
    script.main()
    (path,) = output.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.exhaustive
def test_the_table_has_a_row_for_everything_that_is_calibrated_on(monkeypatch, pictures, tmp_path) -> None:
    recipe = tmp_path / "quick.toml"
    text = (data_folder("calibration") / "fast.toml").read_text(encoding="utf-8")
    recipe.write_text(f"{text}\n[pictures]\ncount = 32\nsteps = 10\n", encoding="utf-8")
    record = run(data_free, monkeypatch, pictures, tmp_path / "out", "table", "--recipe", str(recipe))
    rows = {row["calibration"]: row for row in record["results"]}
    assert len(rows) == 11
    assert all(set(row) >= FIGURES for row in rows.values())
    assert rows["pictures from BN statistics"]["pictures"] == 32
    assert rows["pictures from BN statistics"]["agreement"] > rows["noise pictures"]["agreement"]


@pytest.mark.slow
def test_training_is_recorded_with_its_curves(monkeypatch, pictures, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    case = ("--case", "6-bit per-tensor", "--recipe", "fast", "--steps", "2", "--batch", "8", "--images", "24")
    record = run(qat, monkeypatch, pictures, tmp_path, *case)
    assert [row["when"] for row in record["results"]] == [
        "plain post-training quantization",
        "before training",
        "after training",
    ]
    assert all(set(row) >= FIGURES for row in record["results"])
    assert record["options"]["weight_bits"] == 6
    with (tmp_path / "qat-6-bit-per-tensor.curves.csv").open(encoding="utf-8") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    assert (tmp_path / "qat-6-bit-per-tensor.curves.png").exists()
