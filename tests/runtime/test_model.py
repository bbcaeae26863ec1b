"""A checkpoint or an ONNX graph as something that takes pixels and gives scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.requests import make_request
from helpers.small_nets import make_net, name_in_layout
from onnx import TensorProto, helper

from repvgg_deploy.artifacts import Precision, Preprocessing, PreprocessingOptions
from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.files.kinds import file_kind
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.preprocessing import choose_preprocessing
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.runtime.model import open_model, rank_classes
from repvgg_deploy.workflows.export import export

Save = Callable[..., Path]
SMALL = PreprocessingOptions(size=(32, 32))


@pytest.fixture
def graph(checkpoint_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Export the small checkpoint with any options."""

    def make(**options: Any) -> Path:
        source = options.pop("checkpoint", checkpoint_file)
        return export(make_request(source, tmp_path, **{"preprocessing": SMALL, **options})).onnx

    return make


def pixels(count: int = 3, channels: int = 3, size: int = 32) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


BASE = Preprocessing()


def test_no_option_changes_nothing() -> None:
    assert PreprocessingOptions().apply(BASE) == BASE


def test_size_without_resize_takes_the_whole_short_side() -> None:
    changed = PreprocessingOptions(size=(96, 128)).apply(BASE)
    assert (changed.height, changed.width, changed.resize) == (96, 128, 128)


def test_size_that_the_card_has_anyway_keeps_the_cards_resize() -> None:
    assert PreprocessingOptions(size=(224, 224)).apply(BASE).resize == 256


def test_resize_mean_and_std_are_taken_as_given() -> None:
    changed = PreprocessingOptions((64, 64), 72, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)).apply(BASE)
    assert changed == Preprocessing(64, 64, 72, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    "options", [{"mean": (0.5,)}, {"std": (0.5, 0.5)}, {"std": (0.2, 0.0, 0.2)}, {"std": (0.2, -1.0, 0.2)}]
)
def test_mean_and_std_that_make_no_sense_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(DeployError):
        PreprocessingOptions(**options).apply(BASE)


def test_custom_net_gets_the_preprocessing_of_imagenet(checkpoint_file: Path) -> None:
    assert choose_preprocessing(load_checkpoint(checkpoint_file).spec, PreprocessingOptions()) == Preprocessing()


def test_card_decides_the_preprocessing() -> None:
    assert find_card("D2se").preprocessing.height == 320


@pytest.mark.parametrize("channels", [1, 4])
def test_net_of_other_channels_gets_a_mean_of_one_half_each(channels: int, save: Save) -> None:
    checkpoint = load_checkpoint(save(name_in_layout(make_net(in_channels=channels), "official")))
    chosen = choose_preprocessing(checkpoint.spec, PreprocessingOptions())
    assert (chosen.mean, chosen.std) == ((0.5,) * channels, (0.5,) * channels)


def test_mean_for_another_number_of_channels_than_the_net_takes_is_an_error(checkpoint_file: Path) -> None:
    options = PreprocessingOptions(mean=(0.5,), std=(0.5,))
    with pytest.raises(DeployError, match="the net takes 3 channels"):
        choose_preprocessing(load_checkpoint(checkpoint_file).spec, options)


def test_checkpoint_gives_the_logits_of_its_net(net: RepVGG, checkpoint_file: Path) -> None:
    model = open_model(checkpoint_file, SMALL)
    expected = net(torch.from_numpy(normalize(pixels(), model.preprocessing)))
    assert (model.classes, model.channels, model.runner.backend) == (5, 3, "torch-cpu")
    assert np.array_equal(model.run_pixels(pixels())["logits"], expected)


def test_float64_checkpoint_runs_in_float64(state: dict[str, torch.Tensor], save: Save) -> None:
    path = save({key: t.double() if t.is_floating_point() else t for key, t in state.items()})
    model = open_model(path, SMALL)
    assert model.runner.precision == "fp64"
    assert model.run_pixels(pixels())["logits"].dtype == np.float64


def test_graph_knows_its_preprocessing_classes_and_precision(graph: Callable[..., Path]) -> None:
    model = open_model(graph(class_names=("a", "b", "c", "d", "e")))
    assert model.preprocessing == Preprocessing(32, 32, 32)
    assert (model.classes, model.channels, model.class_names) == (5, 3, ("a", "b", "c", "d", "e"))
    assert (model.runner.backend, model.runner.precision) == ("onnxruntime-cpu", "fp32")


VARIANTS = [
    {},
    {"batch": 2},
    {"uint8_input": True},
    {"uint8_input": True, "batch": 2},
    {"io": Precision.FP16},
    {"precision": Precision.FP16},
    {"precision": Precision.FP16, "io": Precision.FP16},
    {"precision": Precision.FP16, "uint8_input": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.slow
def test_every_kind_of_graph_gives_the_checkpoints_logits_for_any_number_of_images(
    options: dict[str, Any], graph: Callable[..., Path], checkpoint_file: Path
) -> None:
    expected = open_model(checkpoint_file, SMALL).run_pixels(pixels())["logits"]
    logits = open_model(graph(**options)).run_pixels(pixels())["logits"]
    coarse = Precision.FP16 in (options.get("precision"), options.get("io"))
    assert logits.shape == (3, 5)
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < (1e-2 if coarse else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("uint8_input", [False, True])
def test_single_channel_net_takes_the_luma_of_rgb_pixels(uint8_input: bool, save: Save, tmp_path: Path) -> None:
    path = save(name_in_layout(make_net(in_channels=1), "official"))
    rgb = pixels()
    gray = open_model(path, SMALL).run_pixels(rgb)["logits"]
    exported = export(make_request(path, tmp_path, preprocessing=SMALL, uint8_input=uint8_input)).onnx
    assert np.allclose(open_model(exported).run_pixels(rgb)["logits"], gray, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("uint8_input", [False, True])
def test_pixels_of_other_channels_than_the_model_takes_are_an_error(
    uint8_input: bool, save: Save, tmp_path: Path
) -> None:
    path = save(name_in_layout(make_net(in_channels=4), "official"))
    exported = export(make_request(path, tmp_path, preprocessing=SMALL, uint8_input=uint8_input)).onnx
    for model in (open_model(path, SMALL), open_model(exported)):
        assert model.run_pixels(pixels(channels=4))["logits"].shape == (3, 5)
        with pytest.raises(DeployError, match="takes 4 channels"):
            model.run_pixels(pixels())


def test_topk_graph_knows_how_many_classes_there_are(graph: Callable[..., Path]) -> None:
    model = open_model(graph(topk=2))
    assert model.classes == 5
    assert rank_classes(model.run_pixels(pixels()), 5).shape == (3, 2)


def test_another_size_than_the_graphs_is_an_error(graph: Callable[..., Path]) -> None:
    with pytest.raises(DeployError, match="takes 32x32 pixels, not 64x64"):
        open_model(graph(), PreprocessingOptions(size=(64, 64)))


def test_classes_are_ranked_best_first_and_ties_by_number() -> None:
    scores = {"logits": np.array([[1, 3, 2, 3], [0, 0, 0, 0]], np.float16)}
    assert rank_classes(scores, 3).tolist() == [[1, 3, 2], [0, 1, 2]]


def test_missing_model_is_an_error(tmp_path: Path) -> None:
    for name in ("none.onnx", "none.pth"):
        with pytest.raises(DeployError, match="no file"):
            open_model(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\x08\x0a", b"\x08\x0ahello", b"nonsense" * 99])
def test_damaged_graph_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError):
        open_model(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_graph_is_an_error(share: float, graph: Callable[..., Path]) -> None:
    path = graph()
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(GraphError):
        open_model(path)


def test_graph_without_the_right_ending_is_told_by_its_first_byte(graph: Callable[..., Path]) -> None:
    path = graph()
    assert file_kind(path.rename(path.with_suffix(".bin"))) == "onnx"


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([["n", 3, 32, 32]], [["n", 3, 32, 32]]),
        ([["n", 3, 32]], [["n", 3, 32]]),
        ([["n", 3, 32, 32], ["n", 3, 32, 32]], [["n", 3, 32, 32]]),
        ([["n", 3, 32, 32]], [[]]),
    ],
)
def test_graph_that_is_no_image_classifier_is_an_error(
    inputs: list[list[Any]], outputs: list[list[Any]], tmp_path: Path
) -> None:
    ins = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(inputs)]
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape) for shape in outputs]
    node = helper.make_node("Sum", [item.name for item in ins], ["y"])
    model = helper.make_model(
        helper.make_graph([node], "g", ins, outs), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(GraphError):
        open_model(tmp_path / "a.onnx")


def test_a_crop_ratio_stands_for_the_short_side() -> None:
    assert PreprocessingOptions(crop_ratio=0.875).apply(BASE).resize == 256
    assert PreprocessingOptions(size=(96, 96), crop_ratio=0.9).apply(BASE).resize == 106
    with pytest.raises(DeployError, match="crop ratio"):
        PreprocessingOptions(crop_ratio=1.5).apply(BASE)


def test_a_mean_of_bytes_is_refused_with_what_to_do() -> None:
    with pytest.raises(DeployError, match="pixels are scaled to") as caught:
        PreprocessingOptions(mean=(123.675, 116.28, 103.53), std=(58.4, 57.1, 57.4)).apply(BASE)
    assert "255" in caught.value.hint


def test_metadata_have_all_of_the_preprocessing_and_older_ones_are_read() -> None:
    chosen = replace(BASE, interpolation="bicubic", color_order="bgr")
    values = json.loads(chosen.to_json())
    assert (values["interpolation"], values["color_order"]) == ("bicubic", "bgr")
    assert values["scale"] == pytest.approx(1 / 255)
    assert Preprocessing.from_json(chosen.to_json()) == chosen
    for name in ("interpolation", "color_order", "scale"):
        del values[name]
    assert Preprocessing.from_json(json.dumps(values)) == BASE
