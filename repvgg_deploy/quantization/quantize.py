"""`quantize`: a fused net, calibration images and a recipe become a quantized net."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.quantization.augmentation import AugmentedImages
from repvgg_deploy.quantization.bias_headroom import make_room_for_biases
from repvgg_deploy.quantization.dead_inputs import remove_dead_inputs
from repvgg_deploy.quantization.distinct_images import count_distinct
from repvgg_deploy.quantization.equalize import equalize
from repvgg_deploy.quantization.grid import Grid
from repvgg_deploy.quantization.layer_report import report_layers
from repvgg_deploy.quantization.learned_rounding import learn
from repvgg_deploy.quantization.net import QuantizationSummary, QuantizedNet
from repvgg_deploy.quantization.points import Images, layer_names, rebatch
from repvgg_deploy.quantization.recipe import Recipe
from repvgg_deploy.quantization.reconstruct import reconstruct, take_images
from repvgg_deploy.quantization.state import QuantizationState
from repvgg_deploy.quantization.statistics import CalibrationStatistics, collect_statistics
from repvgg_deploy.torch_precision import float32

FEW_IMAGES = 32


# Learned rounding needs gradients, whatever the caller has switched off: this switches them on.
@torch.inference_mode(False)
@float32(deterministic=True)
def quantize(
    fused: RepVGG,
    images: Images,
    recipe: Recipe,
    statistics: CalibrationStatistics | None = None,
    keep_float: Collection[str] = (),
    progress: Progress = SILENT,
) -> QuantizedNet:
    """`fused` with int8 weights and activations, as `recipe` says; `fused` itself is not changed.

    It runs where `fused` is. The result does not depend on how `images` are batched; a GPU sums in another order than a
    CPU, which turns the rounding of some weights.

    Args:
        fused: a net in deploy form, float32, on any device.
        images: batches of normalized images (N, C, H, W), iterated several times.
        recipe: see `load_recipe`.
        statistics: of `fused` on `images`, where they are known already.
        keep_float: names of layers (`stages.S.B`, `classifier`) that are not quantized.
        progress: receives the steps `calibrating` (images), `rounding` (layers) and `learning` (iterations).

    Raises:
        DeployError: there are no images, an image is not finite, a name in `keep_float` is not a layer's, or
            `statistics` are of other augmentations than the recipe's.

    Example:
        >>> from repvgg_deploy import build, fuse, load_checkpoint, load_recipe, quantize
        >>> int8 = quantize(fuse(build(load_checkpoint("net.pth"))), [torch.randn(32, 3, 64, 64)], load_recipe("fast"))
        >>> int8(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 12])
    """
    _check_names(fused, keep_float)
    state = prepare(begin_quantization(fused, images, recipe, statistics, progress=progress))
    return _finish(find_integers(state, images, keep_float, progress), images)


@torch.inference_mode(False)
@float32(deterministic=True)
def find_integers(
    state: QuantizationState, images: Images, keep_float: Collection[str] = (), progress: Progress = SILENT
) -> QuantizationState:
    """The passes after `prepare`: the state with its `result`.

    Rounding is learned, and room is made for biases, for the integers of an INT8 graph only.
    """
    state = reconstruct(state, _take_images(state, images), keep_float, progress)
    return make_room_for_biases(learn(state, images, progress)) if state.grid.is_int8 else state


@torch.inference_mode(False)
@float32(deterministic=True)
def quantize_apart(
    fused: RepVGG,
    images: Images,
    recipe: Recipe,
    statistics: CalibrationStatistics | None = None,
    keep_float: Collection[str] = (),
) -> QuantizedNet:
    """As `quantize`, but no layer makes up for the error of those before: each can be looked at by itself."""
    _check_names(fused, keep_float)
    state = prepare(begin_quantization(fused, images, recipe, statistics))
    state = reconstruct(state, _take_images(state, images), keep_float, chained=False)
    return _finish(make_room_for_biases(state), images)


def begin_quantization(
    fused: RepVGG,
    images: Images,
    recipe: Recipe,
    statistics: CalibrationStatistics | None = None,
    grid: Grid | None = None,
    progress: Progress = SILENT,
) -> QuantizationState:
    """What the first pass is given: a copy of `fused`, and its statistics; by default `grid` is the recipe's INT8.

    Raises:
        DeployError: `statistics` are of other augmentations than the recipe's.
    """
    net = copy.deepcopy(fused).eval().requires_grad_(False)
    if statistics is None:
        statistics = collect_statistics(net, images, augmentations=recipe.augmentations, progress=progress)
    elif statistics.augmentations != recipe.augmentations:
        raise DeployError(
            f"the statistics are of {statistics.augmentations} augmentations of each image, "
            f"and the recipe {recipe.name} takes {recipe.augmentations}",
            "take the recipe that they were made with, or leave out --calib-cache",
        )
    if statistics.images < FEW_IMAGES:
        warnings.warn(
            f"{statistics.images} calibration images are few; use at least {FEW_IMAGES}, preferably 512", stacklevel=3
        )
    distinct = count_distinct(images, FEW_IMAGES)
    if distinct < FEW_IMAGES and 2 * distinct <= statistics.images:
        warnings.warn(
            f"the {statistics.images} calibration images are nearly identical ({distinct} distinct): the scales may "
            f"not fit other images; use at least {FEW_IMAGES} images of different scenes, preferably 512",
            stacklevel=3,
        )
    return QuantizationState(net, statistics, recipe, grid or Grid(full_range=recipe.full_range))


def prepare(state: QuantizationState) -> QuantizationState:
    """The passes that leave the net's function (nearly) as it is: dead inputs, equalization."""
    return equalize(remove_dead_inputs(state))


def _take_images(state: QuantizationState, images: Images) -> Tensor:
    """The images (N, C, H, W) that rounding sees, with their augmentations."""
    recipe, count = state.recipe, state.statistics.images * state.statistics.augmentations
    return take_images(state.net, AugmentedImages(images, recipe.augmentations), count, recipe.rounding.images)


def _finish(state: QuantizationState, images: Images) -> QuantizedNet:
    about, recipe = state.statistics, state.recipe
    rows = report_layers(state, next(rebatch(images, state.net.device)))
    summary = QuantizationSummary(
        recipe.name, about.images, about.images_sha256, recipe.seed, rows, full_range=state.grid.full_range
    )
    return QuantizedNet(state.net, state.integers, summary)


def _check_names(net: RepVGG, names: Collection[str]) -> None:
    if net.spec.hidden:
        raise DeployError("INT8 does not cover a head of several layers", "export it with fp16 or fp32")
    known = layer_names(net)
    for name in names:
        if name not in known:
            raise DeployError(f"no layer is called {name!r}", f"from {known[0]} to {known[-1]}")
