"""The drawn pictures, and the demo model that was trained on them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from repvgg_deploy.checkpoints import Checkpoint, build, load_checkpoint
from repvgg_deploy.errors import ImageError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.images import synthetic as drawn
from repvgg_deploy.images.synthetic import CLASS_NAMES, draw_image, draw_images, image_seed, write_image_folder
from repvgg_deploy.nets.cards import find_card

DEMO = data_folder("models") / "demo.safetensors"
UNSEEN_SEED = 77


def test_same_arguments_give_the_same_bytes() -> None:
    for label in range(len(CLASS_NAMES)):
        assert draw_image(label, 5, 32).tobytes() == draw_image(label, 5, 32).tobytes()


@pytest.mark.parametrize(("label", "seed"), [(3, 6), (4, 5)])
def test_another_label_or_seed_gives_another_picture(label: int, seed: int) -> None:
    assert draw_image(3, 5).tobytes() != draw_image(label, seed).tobytes()


def test_drawing_leaves_numpys_global_generator_alone() -> None:
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    draw_images(3, 0, 16)
    assert np.random.random() == expected


@pytest.mark.parametrize("size", [8, 33, 64, 224])
def test_pictures_are_rgb_of_the_size_asked_for(size: int) -> None:
    image = draw_image(0, 0, size)
    assert (image.mode, image.size) == ("RGB", (size, size))
    assert np.asarray(image).std() > 5


def test_a_seed_gives_the_same_scene_at_any_size() -> None:
    correlations = []
    for label in range(len(CLASS_NAMES)):
        small, large = (np.asarray(draw_image(label, 9, size).resize((8, 8)), float) for size in (64, 128))
        colours = (small - small.mean((0, 1))).ravel(), (large - large.mean((0, 1))).ravel()
        correlations.append(np.corrcoef(*colours)[0, 1])
    assert np.median(correlations) > 0.5


def test_a_set_is_balanced_and_of_the_stated_types() -> None:
    images, labels = draw_images(3 * len(CLASS_NAMES) + 2, 1, 16)
    assert (images.dtype, images.shape) == (np.uint8, (38, 16, 16, 3))
    assert (labels.dtype, labels.shape) == (np.int64, (38,))
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    assert set(counts) == {3, 4}


def test_a_longer_set_begins_with_the_shorter_one() -> None:
    short, long = draw_images(5, 4, 16)[0], draw_images(9, 4, 16)[0]
    assert np.array_equal(short, long[:5])


def test_a_set_holds_the_pictures_of_draw_image() -> None:
    images, labels = draw_images(14, 4, 16)
    assert np.array_equal(images[13], np.asarray(draw_image(int(labels[13]), image_seed(4, 13), 16)))


def test_sets_of_different_seeds_share_no_picture() -> None:
    pictures = [image.tobytes() for seed in (0, 1) for image in draw_images(24, seed, 16)[0]]
    assert len(set(pictures)) == 48


@pytest.mark.parametrize(("label", "seed", "size"), [(-1, 0, 64), (len(CLASS_NAMES), 0, 64), (0, -1, 64), (0, 0, 7)])
def test_impossible_arguments_are_named(label: int, seed: int, size: int) -> None:
    with pytest.raises(ImageError):
        draw_image(label, seed, size)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_every_figure_is_neither_empty_nor_the_whole_picture(name: str) -> None:
    x, y = drawn._grid(64)
    share = drawn._coverage(drawn._FIGURES[name], x + 0 * y, y + 0 * x).mean()
    assert 0.15 < share < 0.75


def test_a_regular_polygon_has_the_area_of_the_formula() -> None:
    x, y = drawn._grid(200)
    for name, corners in {"triangle": 3, "square": 4, "pentagon": 5}.items():
        area = 4 * drawn._coverage(drawn._FIGURES[name], x + 0 * y, y + 0 * x).mean()
        assert area == pytest.approx(corners / 2 * np.sin(2 * np.pi / corners), rel=0.01)


def test_the_background_spectrum_falls_with_the_slope_asked_for() -> None:
    fields = np.concatenate([drawn._noise(np.random.default_rng(seed), 64, 1.2) for seed in range(20)])
    amplitude = np.abs(np.fft.rfft2(fields)).mean(0)
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None, :])
    inside = (frequency > 2 / 64) & (frequency < 0.4)
    inside[:, 0] = False
    slope = np.polyfit(np.log(frequency[inside]), np.log(amplitude[inside]), 1)[0]
    assert slope == pytest.approx(-1.2, abs=0.1)


@pytest.mark.slow
def test_a_hundred_pictures_take_less_than_a_second() -> None:
    started = time.process_time()
    draw_images(100, 0, 64)
    # About 0.23 s where it was written; the bound leaves room for a slower machine.
    assert time.process_time() - started < 1


def test_an_image_folder_holds_the_set_by_class(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "images"
    write_image_folder(folder, 26, seed=3, size=16)
    assert sorted(path.name for path in folder.iterdir()) == sorted(CLASS_NAMES) == list(CLASS_NAMES)
    images, labels = draw_images(26, 3, 16)
    files = {int(path.stem): path for path in folder.glob("*/*.png")}
    assert sorted(files) == list(range(26))
    for index, path in files.items():
        assert path.parent.name == CLASS_NAMES[labels[index]]
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), images[index])
    assert [path.name for path in folder.parent.iterdir()] == ["images"]


def test_an_image_folder_may_be_there_if_it_is_empty(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "a", 1, 0, 16)
    (tmp_path / "b").mkdir()
    write_image_folder(tmp_path / "b", 1, 0, 16)
    assert len(list((tmp_path / "b").glob("*/*.png"))) == 1


def test_an_image_folder_never_touches_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ImageError, match="not an empty folder"):
        write_image_folder(tmp_path, 2, 0, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_a_failed_image_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        write_image_folder(tmp_path / "images", 2, 0, size=4)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return load_checkpoint(DEMO)


def test_the_demo_checkpoint_is_small_and_in_training_form() -> None:
    assert DEMO.stat().st_size <= 2_000_000
    with safe_open(DEMO, "pt") as file:
        keys = set(file.keys())
    assert {"stage0.rbr_dense.conv.weight", "stage1.0.rbr_1x1.bn.weight", "stage1.1.rbr_identity.running_var"} <= keys
    assert {"linear.weight", "linear.bias"} <= keys


def test_the_demo_checkpoint_is_the_demo_card(demo: Checkpoint) -> None:
    assert (demo.layout, demo.form, demo.arch) == ("official", "train", "RepVGG-demo")
    assert demo.spec == find_card("demo").spec()
    assert demo.class_names == CLASS_NAMES


def test_the_demo_card_states_its_own_net(demo: Checkpoint) -> None:
    net, published = build(demo), find_card("demo").published
    for form, millions in ((net, published.train_params_m), (fuse(net), published.deploy_params_m)):
        assert sum(p.numel() for p in form.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    with safe_open(DEMO, "pt") as file:
        assert float(file.metadata()["top1"]) == pytest.approx(published.top1, abs=0.01)


@pytest.mark.slow
def test_the_demo_net_is_good_but_not_perfect_on_unseen_pictures(demo: Checkpoint) -> None:
    net = build(demo)
    images, labels = draw_images(1000, UNSEEN_SEED)
    assert 90 <= measure_top1(net, images, labels) <= 97
    assert 90 <= measure_top1(fuse(net), images, labels) <= 97


@torch.no_grad()
def measure_top1(net: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    preprocessing = find_card("demo").preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(200)
    outputs = torch.cat([net((batch / 255 - mean) / std) for batch in batches])
    return 100 * (outputs.argmax(1).numpy() == labels).mean()


@pytest.mark.exhaustive
@pytest.mark.parametrize("penalty", [1e3, 1e5])
def test_a_linear_classifier_on_the_pixels_fails(penalty: float) -> None:
    images, labels = draw_images(1800, 1)
    pixels = images.reshape(1800, -1) / 64 - 2
    seen, unseen = slice(0, 1200), slice(1200, 1800)
    # Ridge regression on one-hot labels; its dual form needs no more than the products between the pictures.
    products = pixels @ pixels[seen].T
    one_hot = np.eye(len(CLASS_NAMES))[labels[seen]] - 1 / len(CLASS_NAMES)
    scores = products @ np.linalg.solve(products[seen] + penalty * np.eye(1200), one_hot)
    hits = scores.argmax(1) == labels
    # It has learned what it saw, so that it is not for want of training that it fails.
    assert hits[seen].mean() > 0.25
    assert hits[unseen].mean() < 0.5
