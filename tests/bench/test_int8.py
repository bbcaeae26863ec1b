"""The INT8 benchmarks: every command runs on a small net, prints its rows and writes its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from int8 import main
from int8_bench.draws import summarize
from int8_bench.speed import compare_times
from PIL import Image

from repvgg_deploy.images.synthetic import draw_images

FIGURES = {"top1", "top1_fp32", "agreement", "sqnr_db", "median_db", "images", "drop_error"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures in class folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (pixels, label) in enumerate(zip(*draw_images(40, 5), strict=True)):
        (folder / f"{label:02}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{label:02}" / f"{number}.png")
    return folder


def run(output: Path, *arguments: str) -> dict[str, Any]:
    """Run a command, and return its record."""
    result = CliRunner().invoke(main, [*arguments, "-o", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (path,) = output.glob("*.json")
    assert f"written {path}" in result.output
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert record["machine"]["cpu"]
    return record


@pytest.fixture
def data(pictures: Path, checkpoint_file: Path) -> list[str]:
    """The options of a small net and its images."""
    return ["--checkpoint", str(checkpoint_file), "--calib", str(pictures), "--val", str(pictures), "--count", "32"]


@pytest.mark.slow
def test_draws_has_a_row_per_draw_recipe_and_way_and_a_summary_per_recipe_and_way(tmp_path, data) -> None:
    record = run(tmp_path, "draws", *data, "--seed", "1", "--recipe", "fast", "--name", "int8-x")
    assert record["kind"] == "int8-x"
    assert [(row["seed"], row["runs_on"]) for row in record["results"]] == [(1, "onnxruntime"), (1, "as TensorRT")]
    assert all(set(row) > FIGURES for row in record["results"])
    assert [row["draws"] for row in record["summary"]] == [1, 1]


def test_a_summary_has_mean_and_spread_over_the_draws_of_its_own_recipe_and_way() -> None:
    own = {"recipe": "fast", "runs_on": "onnxruntime", "top1_fp32": 80.0}
    drawn = [(79.0, 92.0, 18.0), (81.0, 94.0, 20.0)]
    rows = [{**own, "top1": top1, "agreement": agreement, "sqnr_db": db} for top1, agreement, db in drawn]
    summary = summarize([*rows, {**rows[0], "recipe": "accurate"}], "fast", "onnxruntime")
    assert summary["mean"] == {"drop": 0.0, "agreement": 93.0, "sqnr_db": 19.0}
    assert summary["spread"] == {"drop": 1.41, "agreement": 1.41, "sqnr_db": 1.41}


@pytest.mark.slow
def test_stress_measures_the_named_cases(tmp_path, data) -> None:
    record = run(tmp_path, "stress", *data, "--case", "one channel 1000 x", "--recipe", "fast", "--every", "2")
    assert record["kind"] == "int8-stress-tinyimagenet"
    assert [(row["case"], row["images"]) for row in record["results"]] == [("one channel 1000 x", 20)] * 2


@pytest.mark.slow
def test_faults_describes_the_planted_nets(tmp_path, data) -> None:
    record = run(tmp_path, "faults", *data, "--case", "as it was", "--name", "demo")
    assert record["kind"] == "int8-stress-demo-float"
    (row,) = record["results"]
    assert row["class_as_it_was"] == 100.0
    assert row["kurtosis"]


@pytest.mark.exhaustive
def test_nets_holds_the_recipes_against_the_quantizer_of_onnxruntime(tmp_path) -> None:
    record = run(tmp_path, "nets", "--only", "demo: as it was", "--images", "16", "--count", "32", "--recipe", "fast",
                 "--recipe", "onnxruntime")  # fmt: skip
    assert [row["recipe"] for row in record["results"]] == ["fast", "onnxruntime"]
    assert record["drawn_seeds"]["evaluation"] == 32


@pytest.mark.exhaustive
def test_peers_keeps_the_files_and_refuses_those_of_other_images(tmp_path, data) -> None:
    files = ["--files", str(tmp_path / "files"), "--only", "repvgg-deploy fast"]
    record = run(tmp_path / "first", "peers", *data, *files, "--images", "16", "--cpu-note", "one of two")
    assert record["machine"]["note"] == "one of two"
    assert [row["tool"] for row in record["results"]] == ["repvgg-deploy fast", "repvgg-deploy fast, as TensorRT"]
    assert set(record["results"][0]["native"]) == FIGURES
    data[-1] = "33"
    result = CliRunner().invoke(main, ["peers", *data, *files, "-o", str(tmp_path / "second")])
    assert result.exit_code == 1
    assert "name another folder" in result.output


@pytest.mark.slow
def test_mixed_takes_layers_by_sensitivity_and_at_random(tmp_path, data) -> None:
    pytest.importorskip("matplotlib")
    record = run(tmp_path, "mixed", *data, "--recipe", "fast", "--share", "0", "--share", "0.5", "--seed", "1",
                 "--plots", str(tmp_path / "plots"))  # fmt: skip
    assert [(row["choice"], row["share"]) for row in record["results"]] == [
        ("sensitivity", 0.0), ("sensitivity", 0.5), ("random", 0.5)
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"int8_mixed.png", "int8_mixed.svg"}


@pytest.mark.slow
def test_speed_times_the_three_graphs(tmp_path) -> None:
    record = run(tmp_path, "speed", "--arch", "demo", "--size", "32", "--batch", "1", "--rounds", "2")
    (row,) = record["results"]
    assert set(row["ms"]) == set(row["x"]) == {"fp32", "onnxruntime", "repvgg-deploy"}
    assert row["x"]["fp32"] == 1.0


def test_a_speedup_is_the_median_of_the_ratios_of_the_rounds() -> None:
    # The machine is three times as slow in the second round, and hits both.
    compared = compare_times({"fp32": [8.0, 24.0, 9.0], "int8": [4.0, 12.0, 3.0]})
    assert compared == {"ms": {"fp32": 9.0, "int8": 4.0}, "x": {"fp32": 1.0, "int8": 2.0}}


@pytest.mark.slow
def test_time_counts_each_round(tmp_path, pictures) -> None:
    record = run(tmp_path, "time", "--arch", "demo", "--size", "32", "--no-peers", "--calib", str(pictures), "--count",
                 "32", "--rounds", "2", "--recipe", "fast")  # fmt: skip
    assert record["kind"] == "int8-time-demo-32"
    (row,) = record["results"]
    assert (row["tool"], len(row["seconds"]), row["x_first"]) == ("repvgg-deploy fast", 2, 1.0)


def test_time_wants_one_net(tmp_path, pictures) -> None:
    result = CliRunner().invoke(main, ["time", "--calib", str(pictures), "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "--checkpoint and --arch" in result.output
