"""A model as a function from images to predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.pictures import noise
from helpers.requests import make_request
from PIL import Image

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.errors import GraphError
from repvgg_deploy.images.decoding import DecodingOptions, read_pixels
from repvgg_deploy.images.sources import list_images
from repvgg_deploy.runtime.model import Model, open_model, softmax
from repvgg_deploy.serving import PredictOptions, Predictor, PredictorSpec
from repvgg_deploy.serving.predictor import NOT_FINITE
from repvgg_deploy.workflows.export import export

SMALL = PreprocessingOptions(size=(32, 32))
NAMES = tuple("abcde")


@pytest.fixture
def model(checkpoint_file: Path) -> Model:
    return replace(open_model(checkpoint_file, SMALL), class_names=NAMES)


def expected_probabilities(model: Model, path: Path) -> np.ndarray:
    return softmax(model.run_pixels(read_pixels(path, model.preprocessing)[None])["logits"])[0]


def test_prediction_has_the_best_classes_with_names_and_probabilities(model: Model, image_folder: Path) -> None:
    paths = list_images(image_folder)
    rows = Predictor(model, PredictOptions(topk=3))(paths)
    assert [row.path for row in rows] == list(map(str, paths))
    for row, path in zip(rows, paths, strict=True):
        probabilities = expected_probabilities(model, path)
        best = np.argsort(-probabilities, kind="stable")[:3]
        assert row.classes == tuple(best)
        assert row.names == tuple(NAMES[index] for index in best)
        assert row.scores == pytest.approx(probabilities[best], rel=1e-4)
    assert len({row.classes for row in rows}) > 1


def test_files_bytes_and_pixels_of_one_image_are_predicted_alike(model: Model, image_folder: Path) -> None:
    path = image_folder / "class0" / "0.png"
    predictor = Predictor(model, PredictOptions(decoding=DecodingOptions(decoder="pillow")))
    rows = predictor([path, str(path), path.read_bytes(), np.asarray(Image.open(path).convert("RGB"))])
    assert [row.path for row in rows] == [str(path), str(path), "2", "3"]
    assert len({(row.classes, row.scores) for row in rows}) == 1


def test_gray_pixels_are_an_image_and_floats_are_not(model: Model) -> None:
    gray = noise(20, 30, 1)
    one, three, bad = Predictor(model)([gray, np.stack([gray] * 3, axis=-1), np.zeros((8, 8, 3))])
    assert (one.classes, one.scores) == (three.classes, three.scores)
    assert "are not an image" in str(bad.error)


def test_broken_images_are_rows_at_their_place(model: Model, image_folder: Path) -> None:
    paths = list_images(image_folder)
    Path(str(paths[2])).write_bytes(b"no image")
    rows = Predictor(model, PredictOptions(batch=4))(paths)
    assert [row.error is not None for row in rows] == [index == 2 for index in range(15)]
    assert rows[2].to_dict() == {"path": str(paths[2]), "error": rows[2].error}
    whole = Predictor(model, PredictOptions(batch=4))([path for path in paths if path != paths[2]])
    assert [row.classes for row in rows if row.error is None] == [row.classes for row in whole]


def test_model_without_names_gives_none_and_fewer_classes_than_asked_for(checkpoint_file: Path) -> None:
    (row,) = Predictor(open_model(checkpoint_file, SMALL), PredictOptions(topk=9))([noise(32, 32)])
    assert row.names is None
    assert len(row.classes) == len(row.scores) == 5
    assert sum(row.scores) == pytest.approx(1, abs=1e-5)
    assert row.to_dict() == {"path": "0", "classes": list(row.classes), "names": None, "scores": list(row.scores)}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"softmax": True}, {"batch": 4}, {"topk": 3, "softmax": True}])
def test_graphs_of_every_output_are_predicted_as_their_checkpoint(
    options: dict[str, Any], checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    graph = export(make_request(checkpoint_file, tmp_path, preprocessing=SMALL, **options)).onnx
    paths = list_images(image_folder)
    wanted = PredictOptions(topk=3)
    for ours, theirs in zip(
        Predictor(graph, wanted)(paths), Predictor(open_model(checkpoint_file, SMALL), wanted)(paths), strict=True
    ):
        assert ours.classes == theirs.classes
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-3)


def test_logits_are_added_with_all_their_digits(model: Model) -> None:
    pixels = noise(32, 32)
    (row,) = Predictor(model, PredictOptions(output="logits"))([pixels])
    logits = model.run_pixels(pixels[None])["logits"][0]
    assert np.array_equal(np.array(row.logits, np.float32), logits)
    assert len(row.classes) == 5


def test_output_that_the_graph_lacks_is_an_error(checkpoint_file: Path, tmp_path: Path) -> None:
    graph = export(make_request(checkpoint_file, tmp_path, preprocessing=SMALL, softmax=True)).onnx
    for output in ("logits", "features"):
        with pytest.raises(GraphError, match=f"gives probabilities, not {output}"):
            Predictor(graph, PredictOptions(output=output))([noise(32, 32)])


class Stub:
    """A runner with the outputs that a test wants."""

    backend, backend_version, precision, batch = "test", "0", "fp32", None

    def __init__(self, outputs: Callable[[np.ndarray], dict[str, np.ndarray]]) -> None:
        self.run = outputs


def test_fewer_names_than_classes_are_an_error(model: Model) -> None:
    few = Predictor(replace(model, class_names=NAMES[:1]))
    with pytest.raises(GraphError, match="names 1 classes, and gives class"):
        few([np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(16)])


def test_features_are_given_without_classes(model: Model) -> None:
    features = np.array([[0.1, -2.5, 3e-7]], np.float32)
    runner = Stub(lambda _: {"features": features})
    (row,) = Predictor(replace(model, runner=runner), PredictOptions(output="features"))([noise(32, 32)])
    assert np.array_equal(np.array(row.features, np.float32), features[0])
    assert set(row.to_dict()) == {"path", "features"}


def test_scores_that_are_no_numbers_are_an_error_of_their_row(model: Model) -> None:
    scores = np.array([[0, 1, 2, 3, 4], [0, 1, np.nan, 3, 4], [np.inf, 1, 2, 3, 4]], np.float32)
    rows = Predictor(replace(model, runner=Stub(lambda _: {"logits": scores})))([noise(32, 32)] * 3)
    assert [row.error for row in rows] == [None, NOT_FINITE, NOT_FINITE]


def test_probabilities_of_another_tools_graph_are_taken_as_they_are(model: Model) -> None:
    scores = np.array([[0.1, 0.2, 0.3, 0.15, 0.25]], np.float32)
    (row,) = Predictor(replace(model, runner=Stub(lambda _: {"output": scores})))([noise(32, 32)])
    assert row.scores == pytest.approx((0.3, 0.25, 0.2, 0.15, 0.1))


def test_stream_takes_any_number_of_images_and_reads_no_more_than_it_needs(model: Model) -> None:
    taken = []

    def images() -> Any:
        for number in range(1_000_000):
            taken.append(number)
            yield noise(8, 8)

    stream = Predictor(model, PredictOptions(batch=2)).stream(images())
    assert [next(stream).path for _ in range(3)] == ["0", "1", "2"]
    stream.close()
    assert len(taken) < 50


def test_spec_opens_a_predictor_with_its_options(checkpoint_file: Path) -> None:
    spec = PredictorSpec(checkpoint_file, SMALL, options=PredictOptions(topk=2, batch=3))
    predictor = spec.open()
    assert (predictor.batch, predictor.model.preprocessing.height) == (3, 32)
    assert spec.identity(predictor) == spec.identity(spec.open())
    assert spec.identity(predictor) != replace(spec, options=PredictOptions(topk=3, batch=3)).identity(predictor)
