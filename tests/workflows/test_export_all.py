"""`export --all`: every precision in one run, compared on the same images, and written as one set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.quantized_nets import QUICK_RECIPE
from helpers.small_nets import make_net, name_in_layout

from repvgg_deploy.artifacts import Precision, PreprocessingOptions
from repvgg_deploy.checkpoints import Checkpoint, CheckpointOptions
from repvgg_deploy.errors import DeployError
from repvgg_deploy.progress import SILENT
from repvgg_deploy.runtime.model import open_model
from repvgg_deploy.workflows import export_all as module
from repvgg_deploy.workflows.evaluate import evaluate
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_all import ExportAllRequest, ExportAllResult, export_all
from repvgg_deploy.workflows.export_request import ExportRequest, GraphRequest, Int8Request
from repvgg_deploy.workflows.model_card import CardInput, write_card
from repvgg_deploy.workflows.side_by_side import Agreement, MeasureOptions, compare_accuracy

FILES = ["MODEL_CARD.md", "checkpoint.fp16.onnx", "checkpoint.fp32.onnx", "checkpoint.int8.onnx"]


@pytest.fixture
def request_(checkpoint_file: Path, image_folder: Path, tmp_path: Path, monkeypatch) -> ExportAllRequest:
    # Long enough to be a measurement of a net that takes 0.1 ms.
    monkeypatch.setattr(
        "repvgg_deploy.workflows.side_by_side._MEASURE", MeasureOptions(0, 2, 0.05, 2, pause_s=0, settle_s=0)
    )
    base = ExportRequest(
        checkpoint_file,
        tmp_path / "out",
        preprocessing=PreprocessingOptions(size=(32, 32)),
        int8=Int8Request(image_folder, recipe=QUICK_RECIPE),
    )
    return ExportAllRequest(base, image_folder)


@pytest.mark.slow
def test_the_table_is_what_eval_says_and_the_card_has_it(request_: ExportAllRequest, image_folder: Path) -> None:
    result = export_all(request_)
    out = request_.base.output
    assert sorted(path.name for path in out.iterdir()) == FILES
    card = result.card.read_text(encoding="utf-8")
    for precision, row in result.rows.items():
        graph = out / f"checkpoint.{precision}.onnx"
        assert (row.result.onnx, row.result.precision) == (graph, precision)
        assert row.bytes == graph.stat().st_size
        assert row.sha256 == hashlib.sha256(graph.read_bytes()).hexdigest()
        expected = evaluate(open_model(graph), image_folder)
        assert (row.agreement.top1, row.agreement.top5, row.agreement.images) == (expected.top1, expected.top5, 15)
        assert f"| {' | '.join(row.show())} |" in card
        assert f"`{row.sha256}`" in card
    assert result.rows[Precision.FP32].agreement.agreement == 100
    assert (result.rows[Precision.INT8].speed.images_per_sec or 0) > 0
    fp16 = result.rows[Precision.FP16].speed
    assert (fp16.images_per_sec is None) == fp16.note.startswith("not measured: ")
    assert hashlib.sha256(request_.base.checkpoint.read_bytes()).hexdigest() in card
    assert "- licence of the weights: not stated" in card
    assert "recipe quick, calibrated on 15 images" in card


@pytest.mark.slow
def test_without_labels_there_is_agreement_and_no_accuracy(checkpoint_file: Path, save) -> None:
    size = PreprocessingOptions(size=(32, 32))
    other = save(name_in_layout(make_net(seed=4), "official"), "other.pth")
    paths = {Precision.FP32: checkpoint_file, Precision.FP16: checkpoint_file, Precision.INT8: other}
    models = {precision: open_model(path, size) for precision, path in paths.items()}
    found = compare_accuracy(models, None, None, SILENT)
    assert found[Precision.FP32] == found[Precision.FP16] == Agreement(images=32, agreement=100.0)
    assert found[Precision.INT8].agreement < 100
    assert (found[Precision.INT8].top1, found[Precision.INT8].top5) == (None, None)


@pytest.mark.slow
def test_a_failure_of_the_last_step_leaves_the_files_of_before(request_: ExportAllRequest, monkeypatch) -> None:
    out = request_.base.output
    out.mkdir()
    for name in FILES:
        (out / name).write_text(f"an earlier {name}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(card: CardInput, path: Path) -> None:
        write_card(card, path)
        raise DeployError("the disk is full")

    monkeypatch.setattr(module, "write_card", fail)
    with pytest.raises(DeployError, match="disk is full"):
        export_all(request_)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.slow
def test_the_checkpoint_is_read_once_and_the_graphs_are_those_of_single_exports(
    request_: ExportAllRequest, tmp_path: Path, monkeypatch
) -> None:
    read = []

    def load(source: CheckpointOptions, path: Path) -> Checkpoint:
        read.append(path)
        return load_as(source, path)

    load_as = CheckpointOptions.load
    monkeypatch.setattr(CheckpointOptions, "load", load)
    result = export_all(request_)
    assert read == [request_.base.checkpoint]
    for precision, row in result.rows.items():
        alone = export(request_.one(precision, tmp_path / "alone"))
        assert alone.onnx.read_bytes() == row.result.onnx.read_bytes()


def test_a_checkpoint_without_classes_is_refused(request_: ExportAllRequest, save) -> None:
    net = make_net()
    state = {name: value for name, value in name_in_layout(net, "official").items() if not name.startswith("linear")}
    base = replace(request_.base, checkpoint=save(state, "backbone.pth"))
    with pytest.raises(DeployError, match="this checkpoint has none"):
        export_all(ExportAllRequest(base))
    assert not base.output.exists()


def without_calibration(request: ExportAllRequest) -> ExportAllRequest:
    return replace(request, base=replace(request.base, int8=None))


def of_features(request: ExportAllRequest) -> ExportAllRequest:
    return replace(request, base=replace(request.base, graph=GraphRequest(features=())))


def without_images(request: ExportAllRequest) -> ExportAllRequest:
    return replace(request, validation=request.base.output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_calibration, "needs calibration images"),
        (of_features, "--features has none"),
        (without_images, "there is no"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_exported(
    change: Callable[[ExportAllRequest], ExportAllRequest], message: str, request_: ExportAllRequest, monkeypatch
) -> None:
    def never(*_: object) -> ExportAllResult:
        raise AssertionError("an export has begun")

    monkeypatch.setattr(module, "prepare", never)
    with pytest.raises(DeployError, match=message):
        export_all(change(request_))
    assert not request_.base.output.exists()
