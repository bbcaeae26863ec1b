"""Accuracy on an image folder."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.progress import Heard
from helpers.requests import make_request
from helpers.small_nets import make_net, name_in_layout

from repvgg_deploy.artifacts import Precision, Preprocessing, PreprocessingOptions
from repvgg_deploy.errors import DeployError, ImageError, VerificationError
from repvgg_deploy.images.decoding import normalize, read_pixels
from repvgg_deploy.images.labelled import LabelledImages, list_labelled_images
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.runtime.model import Model, open_model, softmax
from repvgg_deploy.workflows.evaluate import EvaluationOptions, Hits, evaluate, map_classes
from repvgg_deploy.workflows.export import export

Save = Callable[..., Path]
SMALL = PreprocessingOptions(size=(32, 32))


@pytest.fixture
def state(net: RepVGG, image_folder: Path) -> dict[str, torch.Tensor]:
    """A net whose answers differ from image to image: its logits have the mean zero over the folder."""
    base = Preprocessing(32, 32, 32)
    images = np.stack([read_pixels(path, base) for path in list_labelled_images(image_folder).paths])
    net.classifier.bias -= net(torch.from_numpy(normalize(images, base))).mean(0)
    return name_in_layout(net, "official")


@pytest.fixture
def model(checkpoint_file: Path) -> Model:
    return open_model(checkpoint_file, SMALL)


def expected_hits(model: Model, folder: Path, best: int) -> float:
    """The share of images whose class is among the `best` first, one image at a time, in percent."""
    images = list_labelled_images(folder)
    hits = 0
    for path, label in zip(images.paths, images.labels, strict=True):
        (scores,) = next(iter(model.run_pixels(read_pixels(path, model.preprocessing)[None]).values()))
        hits += int(label in np.argsort(-scores, kind="stable")[:best])
    return round(100 * hits / len(images.paths), 4)


def test_top1_and_top5_are_the_shares_of_images_in_percent(model: Model, image_folder: Path) -> None:
    result = evaluate(model, image_folder)
    assert result.images == 15
    assert result.top1 == expected_hits(model, image_folder, 1)
    assert 0 < result.top1 < 100
    assert result.top5 == 100
    assert (result.backend, result.precision, result.broken) == ("torch-cpu", "fp32", {})
    assert result.images_per_sec > 0


@pytest.mark.parametrize("batch", [1, 4, 15, 64])
def test_batch_size_does_not_change_the_accuracy(batch: int, model: Model, image_folder: Path) -> None:
    assert evaluate(model, image_folder, batch).top1 == expected_hits(model, image_folder, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"batch": 4}, {"uint8_input": True}, {"softmax": True}, {"topk": 1}, {"precision": Precision.FP16}]
)
def test_exported_graph_is_as_accurate_as_its_checkpoint(
    options: dict[str, Any], model: Model, checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    graph = export(make_request(checkpoint_file, tmp_path, preprocessing=SMALL, **options)).onnx
    result = evaluate(open_model(graph), image_folder)
    assert result.top1 == evaluate(model, image_folder).top1
    assert result.top5 == (None if options.get("topk") else 100)
    assert result.backend == "onnxruntime-cpu"


def test_top5_is_unknown_below_five_classes(save: Save, image_folder: Path) -> None:
    for label in (3, 4):
        for path in (image_folder / f"class{label}").iterdir():
            path.unlink()
        (image_folder / f"class{label}").rmdir()
    small = open_model(save(name_in_layout(make_net(classes=3), "official")), SMALL)
    assert evaluate(small, image_folder).top5 is None


def test_folders_are_the_classes_in_sorted_order_without_names(model: Model, image_folder: Path) -> None:
    before = evaluate(model, image_folder).top1
    (image_folder / "class0").rename(image_folder / "class9")
    rotated = evaluate(model, image_folder).top1
    named = replace(model, class_names=("class9", "class1", "class2", "class3", "class4"))
    assert evaluate(named, image_folder).top1 == before != rotated


def test_names_with_more_on_the_line_are_matched_by_their_first_word(model: Model, image_folder: Path) -> None:
    images = list_labelled_images(image_folder)
    answers = [
        int(model.run_pixels(read_pixels(path, model.preprocessing)[None])["logits"].argmax()) for path in images.paths
    ]
    # The one folder that is left has the name of the class that the model takes its first picture for.
    names = [f"other{i}, of which there is no folder" for i in range(5)]
    names[answers[0]] = "class0 some kind of thing, or another"
    for label in range(1, 5):
        for path in (image_folder / f"class{label}").iterdir():
            path.unlink()
        (image_folder / f"class{label}").rmdir()
    share = 100 * answers[:3].count(answers[0]) / 3
    assert evaluate(replace(model, class_names=tuple(names)), image_folder).top1 == pytest.approx(share, abs=1e-3)


def test_known_names_allow_a_folder_with_some_of_the_classes(model: Model, image_folder: Path) -> None:
    for path in (image_folder / "class1").iterdir():
        path.unlink()
    (image_folder / "class1").rmdir()
    named = replace(model, class_names=tuple(f"class{i}" for i in range(5)))
    assert evaluate(named, image_folder).images == 12


def test_another_number_of_folders_than_classes_is_an_error(model: Model, image_folder: Path) -> None:
    (image_folder / "class7").mkdir()
    with pytest.raises(DeployError, match="the folder has 6 classes, but the model has 5"):
        evaluate(model, image_folder)


def test_broken_image_is_left_out_and_named(model: Model, image_folder: Path) -> None:
    bad = image_folder / "class2" / "bad.jpg"
    bad.write_bytes(b"\xff\xd8 no image")
    result = evaluate(model, image_folder)
    assert result.images == 15
    assert list(result.broken) == [str(bad)]


def test_broken_image_is_an_error_where_it_is_asked_for(model: Model, image_folder: Path) -> None:
    (image_folder / "class2" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.jpg is not an image"):
        evaluate(model, image_folder, strict=True)


def test_nothing_but_broken_images_is_an_error(model: Model, image_folder: Path) -> None:
    for path in image_folder.rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(ImageError, match="is not an image"):
        evaluate(model, image_folder)


def test_progress_counts_every_image_once(model: Model, image_folder: Path) -> None:
    heard = Heard()
    evaluate(model, image_folder, 4, progress=heard)
    assert heard.steps == [("evaluating", done, 15) for done in (4, 8, 12, 15)]


def damage_classifier(graph: Path, value: float) -> Path:
    """The graph with all weights of its classifier replaced by one value."""
    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("classifier") or list(tensor.dims)[-1:] == [5] or list(tensor.dims)[:1] == [5]:
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(array, value), tensor.name))
    onnx.save(model, graph)
    return graph


@pytest.fixture
def graph(checkpoint_file: Path, tmp_path: Path) -> Path:
    return export(make_request(checkpoint_file, tmp_path, preprocessing=SMALL)).onnx


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_an_error_not_an_accuracy(value: float, graph: Path, image_folder: Path) -> None:
    with pytest.raises(VerificationError, match=r"\.onnx gives NaN or Inf"):
        evaluate(open_model(damage_classifier(graph, value)), image_folder)


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scores_that_do_not_tell_images_or_classes_apart_are_an_error(
    value: float, graph: Path, image_folder: Path
) -> None:
    # All weights 0: the same scores for all images. All 1: for all classes.
    with pytest.raises(VerificationError, match="do not depend on the image"):
        evaluate(open_model(damage_classifier(graph, value)), image_folder)


def test_copies_of_one_image_may_have_the_same_scores(model: Model, image_folder: Path) -> None:
    content = (image_folder / "class0" / "0.png").read_bytes()
    for path in image_folder.rglob("*.*"):
        path.unlink()
        path.with_suffix(".png").write_bytes(content)
    assert evaluate(model, image_folder).images == 15


def test_single_best_class_may_have_one_score(image_folder: Path, checkpoint_file: Path, tmp_path: Path) -> None:
    best = export(make_request(checkpoint_file, tmp_path, preprocessing=SMALL, topk=1)).onnx
    assert evaluate(open_model(best), image_folder).images == 15


def test_folder_that_cannot_be_entered_is_named_and_an_error_where_it_is_asked_for(
    model: Model, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, scan = image_folder / "class3" / "more", os.scandir
    closed.mkdir()

    def refuse(path: Any) -> Any:
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = evaluate(model, image_folder)
    assert (result.images, result.broken) == (15, {str(closed): f"{closed} cannot be read (Permission denied)"})
    with pytest.raises(ImageError, match="more cannot be read"):
        evaluate(model, image_folder, strict=True)


def test_archives_are_as_accurate_as_their_folders(model: Model, image_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(image_folder, "val")
    packed, plain = evaluate(model, tmp_path / "val.tar"), evaluate(model, image_folder)
    assert (packed.top1, packed.images) == (plain.top1, 15)


def test_flat_folder_with_a_ground_truth_is_as_accurate_as_class_folders(
    model: Model, image_folder: Path, tmp_path: Path
) -> None:
    flat, lines = tmp_path / "flat", []
    flat.mkdir()
    for path in image_folder.rglob("*.*"):
        name = f"{path.parent.name}_{path.name}"
        (flat / name).write_bytes(path.read_bytes())
        lines.append(f"{name} {path.parent.name.removeprefix('class')}")
    (tmp_path / "truth.txt").write_text("\n".join(lines))
    options = EvaluationOptions(ground_truth=tmp_path / "truth.txt")
    assert evaluate(model, flat, options=options).top1 == evaluate(model, image_folder).top1
    (tmp_path / "truth.txt").write_text("\n".join([*lines[1:], lines[0].split()[0] + " 5"]))
    with pytest.raises(DeployError, match="the ground truth has class 5, but the model's classes are 0 to 4"):
        evaluate(model, flat, options=options)


def test_class_number_beyond_all_that_there_are_is_an_error_where_the_model_does_not_say_how_many() -> None:
    images = LabelledImages((Path("a.png"), Path("b.png")), (3, 2**40), None)
    with pytest.raises(DeployError, match="the ground truth has class 1099511627776"):
        map_classes(images, None, None)


def test_softmax_is_stable_for_large_logits() -> None:
    assert softmax(np.array([[1e4, 1e4 - np.log(3)]])) == pytest.approx(np.array([[0.75, 0.25]]))


@pytest.mark.slow
def test_trained_weights_reach_their_accuracy(shared: Path, tmp_path: Path) -> None:
    data = shared / "data" / "tinyimagenet"
    names = [line.split()[0] for line in (data / "classes.txt").read_text().splitlines()]
    some = tmp_path / "val"
    some.mkdir()
    for name in names[::10]:
        (some / name).symlink_to(data / "val" / name)
    checkpoint = shared / "checkpoints" / "repvgg_a0_tinyimagenet.pth"
    model = replace(open_model(checkpoint, PreprocessingOptions(size=(64, 64))), class_names=tuple(names))
    torch.manual_seed(0)
    assert evaluate(model, some).top1 > 30


def test_one_folder_that_is_no_class_of_the_model_is_an_error_not_another_order(
    model: Model, image_folder: Path
) -> None:
    named = replace(model, class_names=("class4", "class3", "class2", "class1", "class0"))
    evaluate(named, image_folder)
    (image_folder / "class2").rename(image_folder / "class2_x")
    with pytest.raises(DeployError, match="class2_x is not one of the model's classes"):
        evaluate(named, image_folder)


def test_a_first_word_of_two_classes_names_none(model: Model, image_folder: Path) -> None:
    names = ("great white shark", "great grey owl", "class2", "class3", "class4")
    (image_folder / "class0").rename(image_folder / "great")
    (image_folder / "class1").rename(image_folder / "great grey owl")
    with pytest.raises(DeployError, match="the folder great is not one of"):
        evaluate(replace(model, class_names=names), image_folder)


@pytest.mark.parametrize(
    ("count", "first", "classes", "chance"),
    [
        (1000, 1, 1000, True), (1000, 30, 1000, False), (10, 0, 1000, True), (10, 5, 2, False), (30, 16, 2, True),
        (30, 24, 2, False), (5, 5, 5, False), (40, 40, 1, False),
    ],
)  # fmt: skip
def test_what_guessing_gives_is_told_from_little_data(count: int, first: int, classes: int, chance: bool) -> None:
    assert Hits(count, first).is_chance(classes) is chance


def test_an_accuracy_at_chance_level_is_a_warning_that_names_the_usual_reasons(
    model: Model, image_folder: Path
) -> None:
    heard = Heard()
    found = evaluate(model, image_folder, progress=heard)
    assert found.top1 <= 40
    assert len(found.notes) == 1
    assert [f"warning: {found.notes[0]}"] == [note for note in heard.notes if note.startswith("warning")]
    assert "--size, --mean, --std" in found.notes[0]
