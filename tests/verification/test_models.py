"""The outputs of two models side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.requests import make_request
from helpers.small_nets import make_net, name_in_layout

from repvgg_deploy.artifacts import Parity, PreprocessingOptions
from repvgg_deploy.errors import DeployError, GraphError, ImageError, ThresholdError, VerificationError
from repvgg_deploy.verification.models import Tolerance, VerifyOptions, verify_models
from repvgg_deploy.workflows.export import export

Save = Callable[..., Path]
SMALL = PreprocessingOptions(size=(32, 32))
STRICT = Tolerance(max_relative=1e-5)


@pytest.mark.slow
def test_checkpoint_and_its_graph_agree(checkpoint_file: Path, tmp_path: Path) -> None:
    graph = export(make_request(checkpoint_file, tmp_path, preprocessing=SMALL)).onnx
    for pair in ((checkpoint_file, graph), (graph, checkpoint_file), (graph, graph)):
        parity = verify_models(*pair, VerifyOptions(STRICT))
        assert parity.top1_agreement == 100
        assert parity.images > 1


def test_models_are_compared_on_the_users_images(checkpoint_file: Path, image_folder: Path) -> None:
    parity = verify_models(
        checkpoint_file, checkpoint_file, VerifyOptions(STRICT, data=image_folder, preprocessing=SMALL)
    )
    assert (parity.images, parity.max_abs) == (15, 0)


def test_number_of_images_can_be_limited(checkpoint_file: Path, image_folder: Path) -> None:
    assert (
        verify_models(
            checkpoint_file, checkpoint_file, VerifyOptions(STRICT, data=image_folder, preprocessing=SMALL, count=4)
        ).images
        == 4
    )


def test_broken_image_stops_a_comparison(checkpoint_file: Path, image_folder: Path) -> None:
    (image_folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.png is not an image"):
        verify_models(checkpoint_file, checkpoint_file, VerifyOptions(STRICT, data=image_folder, preprocessing=SMALL))


def test_other_weights_are_beyond_the_tolerance(checkpoint_file: Path, save: Save) -> None:
    other = save(name_in_layout(make_net(seed=8), "official"), "other.pth")
    with pytest.raises(VerificationError, match="outputs differ"):
        verify_models(checkpoint_file, other, VerifyOptions(preprocessing=SMALL))


def test_another_number_of_classes_is_an_error(checkpoint_file: Path, save: Save) -> None:
    other = save(name_in_layout(make_net(classes=6), "official"), "other.pth")
    with pytest.raises(VerificationError, match=r"different shapes: \(16, 5\) and \(16, 6\)"):
        verify_models(checkpoint_file, other, VerifyOptions(preprocessing=SMALL))


@pytest.mark.slow
def test_probabilities_are_compared_with_those_of_the_logits(checkpoint_file: Path, tmp_path: Path) -> None:
    graph = export(make_request(checkpoint_file, tmp_path, preprocessing=SMALL, softmax=True)).onnx
    assert verify_models(checkpoint_file, graph, VerifyOptions(STRICT)).max_abs < 1e-5


@pytest.mark.slow
def test_graph_of_the_best_classes_only_cannot_be_compared(checkpoint_file: Path, tmp_path: Path) -> None:
    graph = export(make_request(checkpoint_file, tmp_path, preprocessing=SMALL, topk=2)).onnx
    with pytest.raises(GraphError, match="gives only its best classes"):
        verify_models(checkpoint_file, graph, VerifyOptions(STRICT))


def test_models_that_take_different_pixels_are_an_error(checkpoint_file: Path, save: Save) -> None:
    other = save(name_in_layout(make_net(in_channels=1), "official"), "gray.pth")
    with pytest.raises(DeployError, match="take different pixels"):
        verify_models(checkpoint_file, other, VerifyOptions(STRICT, preprocessing=SMALL))


def test_net_of_four_channels_is_compared_on_noise_and_refuses_images(save: Save, image_folder: Path) -> None:
    path = save(name_in_layout(make_net(in_channels=4), "official"))
    assert verify_models(path, path, VerifyOptions(STRICT, preprocessing=SMALL)).max_abs == 0
    with pytest.raises(DeployError, match="takes 4 channels"):
        verify_models(path, path, VerifyOptions(STRICT, data=image_folder, preprocessing=SMALL))


FOUND = Parity(max_abs=0.5, relative=0.01, cosine=0.9, top1_agreement=96.0, images=50)


@pytest.mark.parametrize(
    ("tolerance", "precisions", "passes"),
    [
        (Tolerance(), {"fp32"}, False),
        (Tolerance(), {"fp32", "fp16"}, True),
        (Tolerance(max_relative=0.01), {"fp32"}, True),
        (Tolerance(max_relative=0.009), {"fp16"}, False),
        (Tolerance(max_relative=1, max_abs=0.5), {"fp32"}, True),
        (Tolerance(max_relative=1, max_abs=0.49), {"fp32"}, False),
        (Tolerance(max_relative=1, max_disagreement=4.01), {"fp32"}, True),
        (Tolerance(max_relative=1, max_disagreement=3.99), {"fp32"}, False),
        (Tolerance(max_relative=float("nan")), {"fp16"}, False),
        (Tolerance(max_relative=1, max_abs=float("nan")), {"fp16"}, False),
    ],
)
def test_tolerance_is_the_users_or_that_of_the_coarsest_precision(
    tolerance: Tolerance, precisions: set[str], passes: bool
) -> None:
    if passes:
        tolerance.require(FOUND, precisions)
    else:
        with pytest.raises((VerificationError, ThresholdError)):
            tolerance.require(FOUND, precisions)
