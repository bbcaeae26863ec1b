"""`quantize`: a fused net, calibration images and a recipe become a quantized net."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.quantization.augmentation import AugmentedImages
from repvgg_deploy.quantization.bias_headroom import make_room_for_biases
from repvgg_deploy.quantization.dead_inputs import RemovedInputs, remove_dead_inputs
from repvgg_deploy.quantization.equalize import equalize
from repvgg_deploy.quantization.layer_report import report_layers
from repvgg_deploy.quantization.learned_rounding import learn
from repvgg_deploy.quantization.net import QuantizationSummary, QuantizedNet
from repvgg_deploy.quantization.points import Images, layer_names, rebatch
from repvgg_deploy.quantization.recipe import Recipe
from repvgg_deploy.quantization.reconstruct import Reconstruction, reconstruct, take_images
from repvgg_deploy.quantization.statistics import CalibrationStatistics, collect_statistics
from repvgg_deploy.torch_precision import float32

FEW_IMAGES = 32


@dataclass(frozen=True)
class _Prepared:
    """A net whose layers can be rounded one after another.

    Attributes:
        net: a copy of the fused net, its dead inputs removed and its channels equalized.
        chosen: the images (N, C, H, W) that rounding sees, with their augmentations.
        statistics: of the fused net on the calibration images.
        removed: the dead inputs of each layer.
    """

    net: RepVGG
    chosen: Tensor
    statistics: CalibrationStatistics
    removed: dict[str, RemovedInputs]


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
    prepared = _prepare(fused, images, recipe, statistics, keep_float, progress)
    result = reconstruct(prepared.net, prepared.chosen, recipe, keep_float, progress)
    if recipe.learning.steps:
        result = learn(prepared.net, result, images, recipe, progress)
    return _finish(prepared, result, images, recipe)


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
    prepared = _prepare(fused, images, recipe, statistics, keep_float, SILENT)
    result = reconstruct(prepared.net, prepared.chosen, recipe, keep_float, chained=False)
    return _finish(prepared, result, images, recipe)


def _prepare(
    fused: RepVGG,
    images: Images,
    recipe: Recipe,
    statistics: CalibrationStatistics | None,
    keep_float: Collection[str],
    progress: Progress,
) -> _Prepared:
    if fused.spec.hidden:
        raise DeployError("INT8 does not cover a head of several layers", "export it with fp16 or fp32")
    _check_names(fused, keep_float)
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
    removed = prepare(net, statistics, recipe)
    count = statistics.images * statistics.augmentations
    chosen = take_images(net, AugmentedImages(images, recipe.augmentations), count, recipe.rounding.images)
    return _Prepared(net, chosen, statistics, removed)


def _finish(prepared: _Prepared, result: Reconstruction, images: Images, recipe: Recipe) -> QuantizedNet:
    result = make_room_for_biases(result)
    sample = next(rebatch(images, prepared.net.device))
    rows = report_layers(prepared.net, result, prepared.removed, sample)
    about = prepared.statistics
    summary = QuantizationSummary(recipe.name, about.images, about.images_sha256, recipe.seed, rows)
    return QuantizedNet(prepared.net, result, summary)


def prepare(net: RepVGG, statistics: CalibrationStatistics, recipe: Recipe) -> dict[str, RemovedInputs]:
    """The steps that leave the net's function (nearly) as it is: dead inputs, equalization. Changes `net`."""
    removed = {}
    if recipe.dead_inputs is not None:
        removed = remove_dead_inputs(net, statistics, recipe.dead_inputs)
    if recipe.equalize is not None:
        equalize(net, statistics, recipe.equalize)
    return removed


def _check_names(net: RepVGG, names: Collection[str]) -> None:
    known = layer_names(net)
    for name in names:
        if name not in known:
            raise DeployError(f"no layer is called {name!r}", f"from {known[0]} to {known[-1]}")
