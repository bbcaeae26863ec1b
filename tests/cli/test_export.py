"""The commands `export` and `fuse`: what they write and print, and options that are checked before anything is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.commands import NO_ENGINE, failed, failed_late, object_of, run

from repvgg_deploy.checkpoints import load_checkpoint

Save = Callable[..., Path]


def test_export_prints_one_object_with_the_promised_keys(checkpoint_file: Path, tmp_path: Path) -> None:
    value = object_of(run("export", checkpoint_file, "-o", tmp_path / "out", "--size", 32, "--json", *NO_ENGINE))
    promised = "onnx engine arch layout form precision parameters sha256 parity seconds peak_bytes"
    assert set(promised.split()) <= value.keys()
    assert Path(value["onnx"]) == tmp_path / "out" / "checkpoint.fp32.onnx"
    assert value["sha256"] == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    assert (value["engine"], value["layout"], value["form"], value["precision"]) == (None, "official", "train", "fp32")
    for parity in value["parity"].values():
        assert parity.keys() == {"max_abs", "relative", "cosine", "top1_agreement", "images"}


@pytest.mark.slow
def test_export_writes_one_file_and_nothing_else(graph: Path) -> None:
    assert [path.name for path in graph.parent.iterdir()] == ["checkpoint.fp32.onnx"]


@pytest.mark.slow
def test_export_twice_gives_the_same_bytes(graph: Path, checkpoint_file: Path) -> None:
    first = graph.read_bytes()
    assert run("export", checkpoint_file, "-o", graph.parent, "--size", 32, *NO_ENGINE).exit_code == 0
    assert graph.read_bytes() == first


def test_export_names_the_file_after_the_checkpoint_and_the_precision(state, save: Save, tmp_path: Path) -> None:
    path = save(state, "net.v2.pth.tar")
    value = object_of(run("export", path, "-o", tmp_path / "out", "--size", 32, "--fp16", "--json", *NO_ENGINE))
    assert Path(value["onnx"]).name == "net.v2.fp16.onnx"


def test_failed_export_leaves_an_earlier_graph_as_it_was(graph: Path, checkpoint_file: Path) -> None:
    before = graph.read_bytes()
    state = torch.load(checkpoint_file, weights_only=True)
    state["linear.bias"][0] = float("nan")
    torch.save(state, checkpoint_file)
    failed(run("export", checkpoint_file, "-o", graph.parent, "--size", 32, *NO_ENGINE))
    assert graph.read_bytes() == before
    assert [path.name for path in graph.parent.iterdir()] == [graph.name]


def test_output_that_cannot_be_written_is_an_error(checkpoint_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = failed(run("export", checkpoint_file, "-o", tmp_path / "file", "--size", 32, *NO_ENGINE))
    assert "is a file" in error


def test_an_engine_of_another_graph_beside_the_new_one_is_told_of(checkpoint_file: Path, tmp_path: Path) -> None:
    plan = tmp_path / f"{checkpoint_file.stem}.fp32.plan"
    plan.write_bytes(b"another build's")
    result = run("export", checkpoint_file, "-o", tmp_path, "--size", 32, *NO_ENGINE)
    assert f"note: {plan} was built from another graph" in result.stderr
    assert plan.read_bytes() == b"another build's"


def test_fuse_writes_a_deploy_form(checkpoint_file: Path, tmp_path: Path) -> None:
    value = object_of(run("fuse", checkpoint_file, "-o", tmp_path / "f.safetensors", "--layout", "timm", "--json"))
    checkpoint = load_checkpoint(value["file"])
    assert (checkpoint.layout, checkpoint.form, value["layout"]) == ("timm", "deploy", "timm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "99"], "--opset 99 is not supported"),
        (["--opset", "9"], "--opset 9 is not supported"),
        (["--verify-data", "{}/none"], "--verify-data: there is no"),
        (["--int8", "--calib", "{}/none"], "--calib: there is no"),
        (["--int8", "--calib", "{}", "--max-drop", "1", "--val", "{}/none"], "--val: there is no"),
        (["--int8", "--calib", "{}", "--recipe", "none.toml"], "there is no recipe none.toml"),
        (["--labels", "{}/labels.txt", "--topk", "3"], "--topk 3 is more than the 2 classes of --labels"),
        (["--labels", "{}/none"], "cannot read --labels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_options_say_is_checked_before_the_checkpoint_is_read(
    options: list[str], message: str, image_folder: Path
) -> None:
    (image_folder / "labels.txt").write_text("a\nb\n")
    given = [option.format(image_folder) for option in options]
    assert message in failed(run("export", image_folder / "none.pth", *NO_ENGINE, *given))


def test_topk_and_labels_are_checked_against_the_checkpoint_before_anything_is_fused(
    checkpoint_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\n")
    for options in (["--topk", 6], ["--labels", tmp_path / "labels.txt"]):
        result = run("export", checkpoint_file, "--size", 32, *options, *NO_ENGINE)
        assert "fusing" not in result.stderr
        assert "5 classes" in failed(result)


@pytest.mark.parametrize("name", ["net.onnx", "out/net.plan"])
def test_the_name_of_a_file_is_no_folder_to_write_to(name: str, checkpoint_file: Path) -> None:
    result = run("export", checkpoint_file, "-o", name, *NO_ENGINE)
    assert result.exit_code == 2
    assert f"Write `-o {Path(name).parent}`." in " ".join(result.stderr.split())
    assert not Path(name).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"a\n\nb\nc\nd\ne\n", "line 2"), ("ä".encode("latin-1"), "is not UTF-8 text")],
    ids=["empty", "blank line", "latin-1"],
)
def test_labels_that_cannot_be_meant_are_refused(
    content: bytes, message: str, checkpoint_file: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_bytes(content)
    result = run("export", checkpoint_file, "--labels", labels, "--size", 32, "-o", tmp_path / "out", *NO_ENGINE)
    assert message in failed_late(result)
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_no_part_of_the_first_label(checkpoint_file: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\ufeffa\nb\nc\nd\ne\n", encoding="utf-8")
    options = ["--labels", labels, "--size", 32, "-o", tmp_path, *NO_ENGINE]
    assert run("export", checkpoint_file, *options).exit_code == 0
    names = object_of(run("inspect", tmp_path / "checkpoint.fp32.onnx", "--json"))["provenance"]["class_names"]
    assert names[0] == "a"


@pytest.mark.parametrize("options", [["--size", "00"], ["--size", "99999999"], ["--batch-range", "5", "2", "1"]])
def test_values_out_of_range_are_wrong_usage(options: list[str], checkpoint_file: Path) -> None:
    assert run("export", checkpoint_file, *options).exit_code == 2


@pytest.mark.parametrize("size", ["1", "7x7"])
def test_the_smallest_sizes_export(size: str, checkpoint_file: Path, tmp_path: Path) -> None:
    result = run("export", checkpoint_file, "--size", size, "-o", tmp_path / "out", *NO_ENGINE)
    assert result.exit_code == 0, result.output
