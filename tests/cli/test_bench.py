"""The commands `bench` and `report`, run for real on small graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.small_nets import make_net, name_in_layout

from repvgg_deploy.benchmark.record import check_record, read_record
from repvgg_deploy.cli.main import main
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx

QUICK = ["--duration", "0.05", "--iterations", "3", "--warmup", "0"]

# Slow enough to be measured, quick enough for a test.
SUITE = """
name = "small"
[measure]
warmup_s = 0.0
slice_s = 0.01
pause_s = 0.0
settle_s = 0.0
min_duration_s = 0.02
min_iterations = 2
min_rounds = 2
[[group]]
models = ["{a}", "{b}"]
batches = [1, 2]
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "small.onnx"
    metadata = {"repvgg_deploy.precision": "fp32"}
    net: Any = fuse(make_net(), torch.float32)
    write_graph(to_onnx(net, FloatLayers(), GraphOptions(32, 32), metadata), path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "small.pth"
    torch.save(name_in_layout(make_net(), "official"), path)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("short_turns")
def test_the_json_is_one_object_of_the_schema(graph: Path) -> None:
    result = run("bench", graph, "--batch", 1, "--batch", 4, "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    record = check_record(json.loads(result.stdout))
    assert [entry["batch"] for entry in record["results"]] == [1, 4]
    for entry in record["results"]:
        assert (entry["backend"], entry["precision"]) == ("onnxruntime-cpu", "fp32")
        expected = entry["batch"] * entry["iterations"] / entry["duration_s"]
        assert entry["images_per_sec"] == pytest.approx(expected, rel=1e-4)
        assert entry["latency_ms"]["min"] <= entry["latency_ms"]["p50"] <= entry["latency_ms"]["p99"]


@pytest.mark.slow
@pytest.mark.usefixtures("short_turns")
def test_a_graph_and_a_checkpoint_are_measured_side_by_side(graph: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = run("bench", graph, checkpoint, "-o", tmp_path / "out.json", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert {entry["backend"] for entry in read_record(tmp_path / "out.json")["results"]} == {
        "onnxruntime-cpu",
        "torch-cpu",
    }
    assert "small.onnx" in result.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["torch-cpu", "onnxruntime-cpu"])
def test_both_forms_are_compared(backend: str, checkpoint: Path) -> None:
    result = run("bench", checkpoint, "--form", "both", "--backend", backend, "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    (ratio,) = json.loads(result.stdout)["ratios"]
    assert (ratio["form"], ratio["baseline_form"]) == ("deploy", "training")
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]


@pytest.mark.exhaustive
def test_the_baseline_runs_as_the_model_does(graph: Path) -> None:
    result = run("bench", graph, "--baseline", "resnet18", "--json", "--roofline", *QUICK)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    mine, theirs = record["results"]
    assert theirs["model"] == "ResNet-18"
    assert (mine["backend"], mine["precision"]) == (theirs["backend"], theirs["precision"])
    (ratio,) = record["ratios"]
    # The median over the turns, beside the throughput over all of them: on a busy machine they are not the same.
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert ratio["ratio"] == pytest.approx(mine["images_per_sec"] / theirs["images_per_sec"], rel=0.5)
    assert (mine["input"], theirs["input"]) == ("32x32", "32x32")
    # It has a few channels only.
    assert ratio["low"] > 1
    assert record["ceilings"].keys() == {"cpu fp32"}
    assert theirs["roofline"]["tflops"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("short_turns")
@pytest.mark.parametrize(
    ("option", "limit", "status"),
    [("--min-images-per-sec", 1e9, 3), ("--min-images-per-sec", 1e-3, 0)],
)
def test_a_limit_fails_the_command(option: str, limit: float, status: int, graph: Path) -> None:
    result = run("bench", graph, option, limit, *QUICK)
    assert result.exit_code == status
    assert ("error:" in result.stderr) == bool(status)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "how"),
    [
        ("onnx", QUICK),
        ("pth", ["--backend", "torch-cpu", *QUICK]),
        ("onnx", ["--profile", "--duration", "0.05"]),
        ("onnx", ["--input", "jpeg", "IMAGES", "--duration", "0.05"]),
    ],
)
def test_a_model_that_gives_no_numbers_is_not_measured_however_fast_it_is(
    ending: str, how: list[str], tmp_path: Path, image_folder: Path
) -> None:
    net = make_net()
    with torch.no_grad():
        # Finite, as a checkpoint's weights have to be; their products are not.
        net.classifier.weight.fill_(3e38)
    if ending == "pth":
        torch.save(name_in_layout(net, "official"), tmp_path / "small.pth")
    else:
        fused: Any = fuse(net, torch.float32)
        graph = to_onnx(fused, FloatLayers(), GraphOptions(32, 32), {"repvgg_deploy.precision": "fp32"})
        write_graph(graph, tmp_path / "small.onnx")
    how = [str(image_folder) if word == "IMAGES" else word for word in how]
    result = run("bench", tmp_path / f"small.{ending}", *how)
    assert result.exit_code == 1
    assert f"error: small.{ending}" in result.stderr
    assert "gives NaN or Inf, so its speed means nothing" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.onnx"], "there is no file"),
        (["A0", "--backend", "torch-cpu", "--precision", "int8"], "does not run int8"),
        (["resnet18", "--form", "training"], "one form only"),
    ],
)
def test_what_cannot_run_is_an_error(arguments: list[str], message: str) -> None:
    result = run("bench", *arguments, *QUICK)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [[], ["A0", "--suite", "x.toml"], ["A0", "--min-ratio", "1"], ["A0", "B0", "--profile"]]
)
def test_options_that_contradict_are_wrong_usage(arguments: list[str]) -> None:
    assert run("bench", *arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "'nonsense' is neither a file nor an architecture"),
        (["B1g"], "Did you mean B1g4 or B1g2 or B1?"),
        (["A0", "--backend", "onnxruntime"], "Did you mean onnxruntime-cpu or onnxruntime-cuda"),
        (["A0", "--precision", "int4"], "Did you mean int8?"),
        (["A0", "--baseline", "resnet5"], "Did you mean resnet50"),
        (["A0", "--batch", "1", "8"], "write --batch 1,8 or repeat the option"),
        (["A0", "--size", "64"], "--size is for --input jpeg DIR"),
        (["A0", "--profile", "--baseline", "resnet50"], "--baseline has no effect here"),
        (["--suite", "x.toml", "--batch", "2"], "--batch has no effect here: the suite says it"),
        (["A0", "--min-ratio", "1"], "--min-ratio needs --baseline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_says_what_was_typed_and_what_to_type(arguments: list[str], message: str) -> None:
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.exhaustive
def test_lists_of_batches_backends_and_precisions_are_all_measured(checkpoint: Path) -> None:
    lists = ["--batch", "1,2", "--batch", "3", "--backend", "torch-cpu,onnxruntime-cpu", "--precision", "fp32"]
    result = run("bench", checkpoint, *lists, "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    measured = [(r["batch"], r["backend"]) for r in json.loads(result.stdout)["results"]]
    assert sorted(measured) == [(b, backend) for b in (1, 2, 3) for backend in ("onnxruntime-cpu", "torch-cpu")]


def test_an_output_that_is_a_folder_is_an_error_before_anything_is_measured(graph: Path, tmp_path: Path) -> None:
    result = run("bench", graph, "-o", tmp_path, *QUICK)
    assert result.exit_code == 2
    assert f"-o {tmp_path / 'result.json'}" in result.stderr


def test_a_graph_has_one_form(graph: Path) -> None:
    result = run("bench", graph, "--form", "both", *QUICK)
    assert result.exit_code == 1
    assert "runs as it was exported" in result.stderr


def test_a_graph_of_another_precision_is_refused(graph: Path) -> None:
    result = run("bench", graph, "--precision", "int8", *QUICK)
    assert result.exit_code == 1
    assert "is fp32, not int8" in result.stderr


def test_an_engine_is_not_run_by_something_else(tmp_path: Path) -> None:
    plan = tmp_path / "net.plan"
    plan.write_bytes(b"plan")
    result = run("bench", plan, "--backend", "onnxruntime-cpu", *QUICK)
    assert result.exit_code == 1
    assert "is an engine" in result.stderr


@pytest.mark.slow
def test_a_suite_that_was_stopped_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    suite, output = tmp_path / "suite.toml", tmp_path / "out.json"
    # Names of files in a suite are models as well.
    suite.write_text(SUITE.format(a=checkpoint, b=checkpoint), encoding="utf-8")
    assert run("bench", "--suite", suite, "-o", output).exit_code == 0
    whole = json.loads(output.read_text(encoding="utf-8"))
    assert len({result["group"] for result in whole["results"]}) == 2
    first = whole["results"][0]["group"]
    stopped = {**whole, "results": [r for r in whole["results"] if r["group"] == first]}
    output.write_text(json.dumps(stopped), encoding="utf-8")
    result = run("bench", "--suite", suite, "-o", output)
    assert "measured before" in result.stderr
    again = json.loads(output.read_text(encoding="utf-8"))
    kept = [r for r in again["results"] if r["group"] == first]
    assert kept == stopped["results"]
    assert {r["group"] for r in again["results"]} == {r["group"] for r in whole["results"]}


@pytest.mark.slow
def test_other_options_do_not_go_on_with_an_old_result(checkpoint: Path, tmp_path: Path) -> None:
    suite, output = tmp_path / "suite.toml", tmp_path / "out.json"
    suite.write_text(SUITE.format(a=checkpoint, b=checkpoint), encoding="utf-8")
    run("bench", "--suite", suite, "-o", output)
    suite.write_text(SUITE.format(a=checkpoint, b=checkpoint).replace("0.02", "0.03"), encoding="utf-8")
    result = run("bench", "--suite", suite, "-o", output)
    assert result.exit_code == 1
    assert "other options" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "another"}, "is called 'another'"),
        ({"versions": {"torch": "1.0"}}, "measured with the versions torch 1.0"),
        ({"gpus": [{"name": "NVIDIA H200"}]}, "measured with the GPUs NVIDIA H200"),
    ],
    ids=["suite", "versions", "gpu"],
)
def test_another_suite_or_machine_does_not_go_on_with_an_old_result(
    change: dict[str, object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    suite, output = tmp_path / "suite.toml", tmp_path / "out.json"
    suite.write_text(SUITE.format(a=checkpoint, b=checkpoint), encoding="utf-8")
    run("bench", "--suite", suite, "-o", output)
    record = json.loads(output.read_text(encoding="utf-8"))
    changed = {**record, **change} if "name" in change else {**record, "machine": {**record["machine"], **change}}
    output.write_text(json.dumps(changed), encoding="utf-8")
    result = run("bench", "--suite", suite, "-o", output)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.exhaustive
def test_the_baseline_is_opened_once_for_all_batches(graph: Path) -> None:
    result = run("bench", graph, "--baseline", "resnet18", "--batch", 1, "--batch", 2, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("opening resnet18") == 1
    assert result.stderr.count(f"opening {graph}") == 1


def test_the_profile_names_every_convolution(graph: Path) -> None:
    result = run("bench", graph, "--profile", "--json", "--duration", "0.05")
    assert result.exit_code == 0, result.stderr
    profile = json.loads(result.stdout)
    assert sum(layer["share"] for layer in profile["layers"]) == pytest.approx(1.0)
    costly = [layer for layer in profile["layers"] if layer["cost"] is not None]
    assert len(costly) == len(make_net().spec.blocks) + 1


@pytest.mark.slow
def test_from_files_on_the_stages_and_the_limit_are_named(graph: Path, image_folder: Path) -> None:
    arguments = ["--input", "jpeg", image_folder, "--batch", 4, "--duration", "0.2", "--json"]
    result = run("bench", graph, *arguments)
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["end_to_end"]
    assert found["stages"].keys() == {"decode", "resize", "prepare", "inference"}
    assert found["limit"] in found["stages"]
    assert found["stages"][found["limit"]] == min(found["stages"].values())
    assert found["images_per_sec"] > 0


@pytest.mark.slow
def test_a_report_is_one_page_with_its_plots(checkpoint: Path, tmp_path: Path) -> None:
    suite, output, page = tmp_path / "suite.toml", tmp_path / "out.json", tmp_path / "report.html"
    suite.write_text(SUITE.format(a=checkpoint, b=checkpoint) + 'forms = ["training", "deploy"]\n', encoding="utf-8")
    assert run("bench", "--suite", suite, "-o", output).exit_code == 0
    result = run("report", output, "-o", page, "--plots", tmp_path / "plots", "--json")
    assert result.exit_code == 0, result.stderr
    files = [Path(name) for name in json.loads(result.stdout)["files"]]
    assert all(file.is_file() for file in files)
    text = page.read_text(encoding="utf-8")
    assert "data:image/png;base64," in text
    assert 'src="http' not in text
    assert page.with_suffix(".md") in files


@pytest.mark.parametrize("content", ["{}", "[", '{"schema": {"name": "repvgg-deploy/bench", "version": 0}}'])
def test_a_report_of_something_else_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(content, encoding="utf-8")
    result = run("report", path, "-o", tmp_path / "report.html")
    assert result.exit_code == 1
    assert not (tmp_path / "report.html").exists()


def test_a_model_whose_name_no_file_system_takes_is_one_error() -> None:
    for name in ("x" * 300, "y/" * 3000):
        found = CliRunner().invoke(main, ["bench", name, "--duration", "0"])
        assert found.exit_code in (1, 2), found.exception
        assert found.stderr.count("rror: ") == 1
