"""The preprocessing as a graph gives what Pillow gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.pictures import noise
from PIL import Image

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.preprocessing import PIXELS, NetInput, make_preprocessing
from repvgg_deploy.images.decoding import crop_image, normalize
from repvgg_deploy.runtime.session import GraphSession

SMALL = Preprocessing(height=48, width=40, resize=56)
FLOATS, BYTES = NetInput("images", "float32"), NetInput("images", "uint8", takes_pixels=True)


def smooth(height: int, width: int) -> np.ndarray:
    """Noise of low frequencies, where the filter matters and rounding is not everything."""
    small = Image.fromarray(noise(9, 7, seed=height))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def run(preprocessing: Preprocessing, net_input: NetInput, picture: np.ndarray) -> np.ndarray:
    graph = make_preprocessing(preprocessing, net_input)
    return GraphSession(graph.to_proto()).run({PIXELS: picture})[net_input.name]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(120, 201), (151, 97), (30, 33), (56, 56), (57, 80), (1, 5)])
def test_pixels_are_those_of_pillow(interpolation: str, size: tuple[int, int]) -> None:
    preprocessing = replace(SMALL, interpolation=interpolation)
    for picture in (smooth(*size), noise(*size)):
        expected = np.asarray(crop_image(Image.fromarray(picture), preprocessing)).astype(int)
        difference = np.abs(run(preprocessing, BYTES, picture)[0].astype(int) - expected)
        assert difference.max() <= 1
        assert (difference == 0).mean() > 0.98


def test_no_edge_is_darker_when_the_crop_is_the_whole_picture() -> None:
    preprocessing = Preprocessing(height=32, width=32, resize=32)
    picture = noise(375, 375)
    expected = np.asarray(crop_image(Image.fromarray(picture), preprocessing)).astype(int)
    assert np.abs(run(preprocessing, BYTES, picture)[0].astype(int) - expected).max() <= 1


def test_values_are_normalized_in_the_order_and_type_of_the_net() -> None:
    picture = smooth(90, 70)
    pixels = run(SMALL, BYTES, picture)
    assert np.array_equal(run(SMALL, FLOATS, picture), normalize(pixels, SMALL))
    swapped = run(replace(SMALL, color_order="bgr"), FLOATS, picture)
    assert np.array_equal(swapped, normalize(np.ascontiguousarray(pixels[..., ::-1]), SMALL))
    half = run(SMALL, NetInput("images", "float16"), picture)
    assert half.dtype == np.float16
    assert np.array_equal(half, normalize(pixels, SMALL).astype(np.float16))


@pytest.mark.parametrize("size", [(3, 4001), (4000, 2)])
def test_a_strip_is_not_resized_as_a_whole(size: tuple[int, int]) -> None:
    picture = smooth(*size)
    graph = GraphSession(make_preprocessing(SMALL, BYTES).to_proto())
    expected = np.asarray(crop_image(Image.fromarray(picture), SMALL)).astype(int)
    assert np.abs(graph.run({PIXELS: picture})["images"][0].astype(int) - expected).max() <= 16


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"mean": (0.5,), "std": (0.2,)}, "1 channels"),
        ({"resize": 44}, "does not pad"),
    ],
)
def test_what_the_graph_cannot_do_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(GraphError, match=said):
        make_preprocessing(replace(SMALL, **changed), FLOATS)
