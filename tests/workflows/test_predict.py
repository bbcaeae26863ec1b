"""Files of predictions: whole or absent, in order, and the same whether or not a run was interrupted."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.pictures import jpeg, noise, write_tar
from PIL import Image

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.errors import DeployError, ImageError, VerificationError
from repvgg_deploy.serving import PredictOptions, Predictor, PredictorSpec
from repvgg_deploy.serving.predictor import NOT_FINITE, Prediction
from repvgg_deploy.workflows import predict as workflow
from repvgg_deploy.workflows.predict import PredictRequest, predict, predict_to_file

SMALL = PreprocessingOptions(size=(32, 32))


@pytest.fixture
def request_(checkpoint_file: Path, image_folder: Path, tmp_path: Path) -> PredictRequest:
    spec = PredictorSpec(checkpoint_file, SMALL, options=PredictOptions(topk=2, batch=4))
    return PredictRequest(spec, (str(image_folder),), tmp_path / "out" / "rows.jsonl")


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def partial(request: PredictRequest) -> Path:
    return request.output.with_name(request.output.name + ".partial")


def test_iterator_gives_predictions_of_a_folder_in_order(checkpoint_file: Path, image_folder: Path) -> None:
    paths = [prediction.path for prediction in predict(checkpoint_file, image_folder)]
    assert paths == [str(path) for path in sorted(image_folder.rglob("*.*"))]
    (prediction,) = predict(str(checkpoint_file), [noise(32, 32)])
    assert len(prediction.classes) == 5


def test_rows_are_the_predictions_in_order(request_: PredictRequest, image_folder: Path) -> None:
    summary = predict_to_file(request_)
    predictor = request_.spec.open()
    assert rows_of(request_.output) == [row.to_dict() for row in predictor(sorted(image_folder.rglob("*.*")))]
    assert (summary.images, summary.broken, summary.resumed, summary.backend) == (15, 0, 0, "torch-cpu")
    assert [path.name for path in request_.output.parent.iterdir()] == ["rows.jsonl"]


def test_same_rows_in_every_format(request_: PredictRequest, image_folder: Path) -> None:
    (image_folder / "class1" / "0.png").write_bytes(b"no image")
    predict_to_file(request_)
    expected = rows_of(request_.output)
    table = replace(request_, output=request_.output.with_suffix(".csv"))
    assert predict_to_file(table).broken == 1
    with table.output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "class_1", "score_1", "class_2", "score_2", "error"]
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    for row, known in zip(rows, expected, strict=True):
        assert row["error"] == known.get("error", "")
        assert [row["class_1"], row["class_2"]] == list(map(str, known.get("classes", ["", ""])))


@pytest.mark.slow
def test_parquet_has_typed_columns_and_the_same_rows(request_: PredictRequest, image_folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    (image_folder / "class1" / "0.png").write_bytes(b"no image")
    predict_to_file(request_)
    table = replace(request_, output=request_.output.with_suffix(".parquet"))
    predict_to_file(table)
    rows = parquet.read_table(table.output).to_pylist()
    for row, known in zip(rows, rows_of(request_.output), strict=True):
        assert (row["path"], row["error"]) == (known["path"], known.get("error"))
        assert row["classes"] == known.get("classes")
        assert (row["scores"] or []) == pytest.approx(known.get("scores", []), rel=1e-6)
    assert predict_to_file(replace(table, resume=True)).resumed == 15


def test_parquet_without_pyarrow_says_what_to_install(
    request_: PredictRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DeployError, match="pyarrow is not installed"):
        predict_to_file(replace(request_, output=request_.output.with_suffix(".parquet")))


def test_unknown_ending_is_an_error(request_: PredictRequest) -> None:
    with pytest.raises(DeployError, match="has no known ending"):
        predict_to_file(replace(request_, output=request_.output.with_suffix(".txt")))


def test_images_come_from_folders_patterns_lists_archives_and_standard_input(
    request_: PredictRequest, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_tar(tmp_path / "shard-0.tar", {"x.jpg": jpeg(1), "y.jpg": jpeg(2)})
    (tmp_path / "list.txt").write_text("images/class4/0.png\nimages/class4/gone.png\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{image_folder}/class3/0.png\n{archive}\n"))
    images = ("-", f"{image_folder}/class?/1.jpg", str(tmp_path / "list.txt"), str(image_folder / "class0"))
    predict_to_file(replace(request_, images=images))
    assert [str(row["path"]).removeprefix(str(tmp_path) + "/") for row in rows_of(request_.output)] == [
        *("images/class3/0.png", "shard-0.tar/x.jpg", "shard-0.tar/y.jpg"),
        *(f"images/class{label}/1.jpg" for label in range(5)),
        *("images/class4/0.png", "images/class4/gone.png", "images/class0/0.png", "images/class0/2.bmp"),
    ]
    assert list(rows_of(request_.output)[9]) == ["path", "error"]


@pytest.mark.slow
def test_run_goes_on_from_wherever_it_was_cut_with_the_same_bytes(
    request_: PredictRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_to_file(request_)
    whole = request_.output.read_bytes()
    request_.output.unlink()
    # The journal of a run that was killed before the last step.
    monkeypatch.setattr(workflow, "write_predictions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(request_)
    monkeypatch.undo()
    journal = partial(request_).read_bytes()
    assert not request_.output.exists()
    places = [0, 5, *range(len(journal) - 130, len(journal), 29), *range(40, len(journal), len(journal) // 6)]
    for place in places:
        partial(request_).write_bytes(journal[:place])
        summary = predict_to_file(replace(request_, resume=True))
        assert request_.output.read_bytes() == whole
        assert summary.resumed == max(0, journal[:place].count(b"\n") - 1)
        assert not partial(request_).exists()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_finished_images_are_not_run_again(request_: PredictRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Predictor.stream
    runs = []

    def stop_after_two_batches(self: Predictor, images: object) -> object:
        for number, row in enumerate(stream(self, images)):
            if number == 8 and not runs:
                runs.append(number)
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(Predictor, "stream", stop_after_two_batches)
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(request_)
    assert not request_.output.exists()
    assert predict_to_file(replace(request_, resume=True)).resumed == 8
    assert len(rows_of(request_.output)) == 15
    assert predict_to_file(replace(request_, resume=True)).images_per_sec is None


def test_journal_of_another_model_or_of_other_options_is_not_continued(
    request_: PredictRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "write_predictions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(request_)
    monkeypatch.undo()
    other = replace(request_.spec, options=replace(request_.spec.options, topk=3))
    with pytest.raises(DeployError, match=r"rows\.jsonl\.partial was written with another model or with other options"):
        predict_to_file(replace(request_, spec=other, resume=True))
    # Without --resume it is begun anew.
    predict_to_file(replace(request_, spec=other))
    assert {len(row["classes"]) for row in rows_of(request_.output)} == {3}


def test_two_processes_do_not_write_one_file(request_: PredictRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_second(*_: object) -> None:
        monkeypatch.undo()
        predict_to_file(request_)

    monkeypatch.setattr(workflow, "write_predictions", run_second)
    with pytest.raises(DeployError, match="another process is writing"):
        predict_to_file(request_)


def test_broken_image_is_an_error_where_it_is_asked_for(request_: PredictRequest, image_folder: Path) -> None:
    (image_folder / "class0" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"1\.jpg is not an image"):
        predict_to_file(replace(request_, strict=True))
    assert not request_.output.exists()


def test_model_that_gives_no_number_for_any_image_writes_nothing(
    request_: PredictRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Predictor, images: Iterable[Path]) -> Iterator[Prediction]:
        yield from (Prediction(str(image), error=NOT_FINITE) for image in images)

    monkeypatch.setattr(Predictor, "stream", fail)
    with pytest.raises(VerificationError, match="gives NaN or Inf for every image"):
        predict_to_file(request_)
    assert not request_.output.exists()


def test_name_that_is_not_utf_8_is_a_row_in_every_format(request_: PredictRequest, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    name = os.fsdecode(b'\xff\n,".png')
    Image.fromarray(noise(32, 32)).save(folder / name)
    request = replace(request_, images=(str(folder),))
    for ending in ("jsonl", "csv"):
        predict_to_file(replace(request, output=tmp_path / f"rows.{ending}"))
        assert predict_to_file(replace(request, output=tmp_path / f"rows.{ending}", resume=True)).resumed == 1
    assert rows_of(tmp_path / "rows.jsonl")[0]["path"] == f"{folder}/{name}"


def test_old_output_stays_until_the_new_one_is_whole(request_: PredictRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    request_.output.parent.mkdir()
    request_.output.write_text("old")
    monkeypatch.setattr(workflow, "write_predictions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(request_)
    assert request_.output.read_text() == "old"


@pytest.mark.slow
def test_standard_input_that_is_not_utf_8_or_not_there_is_no_traceback(
    request_: PredictRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(b"\xff.png")
    Image.fromarray(noise(32, 32)).save(tmp_path / name)
    request = replace(request_, images=("-",))
    given = io.BytesIO(os.fsencode(f"{tmp_path}/{name}\n"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given, encoding="utf-8", errors="strict"))
    summary = predict_to_file(request)
    assert (summary.images, summary.broken) == (1, 0)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ImageError, match="there is no standard input"):
        predict_to_file(request)


def limit_files() -> None:
    """No file of this process may grow beyond a few rows, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.mark.exhaustive
def test_process_that_is_killed_loses_and_doubles_nothing(
    checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(300):
        (many / f"{number:03}.png").symlink_to(image_folder / f"class{number % 5}" / "0.png")
    command = [sys.executable, "-m", "repvgg_deploy", "predict", str(checkpoint_file), str(many), "--batch", "1"]
    command += ["--size", "32", "--resume", "-o"]
    output = tmp_path / "rows.jsonl"
    journal = output.with_name("rows.jsonl.partial")
    full = subprocess.run([*command, str(output)], capture_output=True, preexec_fn=limit_files)
    assert (full.returncode, output.exists()) == (1, False)
    assert b"error: cannot write" in full.stderr
    assert b"--resume" in full.stderr
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = journal.read_bytes().count(b"\n") if journal.exists() else 0
        process = subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < before + 20):
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143}[number]
        assert (b"finished images; --resume continues after them" in said) == (number == signal.SIGTERM)
        assert not output.exists()
    resumed = subprocess.run([*command, str(output), "--json"], capture_output=True, check=True)
    assert json.loads(resumed.stdout)["resumed"] >= 38
    subprocess.run([*command, str(tmp_path / "whole.jsonl")], check=True, capture_output=True)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(rows_of(output)) == 300
