"""The INT8 stage of an export: calibration images, statistics, recipe, and the quantized net."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.calibration import CalibrationImages, choose_images
from repvgg_deploy.errors import DeployError, ImageError
from repvgg_deploy.export_request import Int8Request
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantize import CalibrationStatistics, QuantizedNet, collect_statistics, load_recipe, quantize
from repvgg_deploy.staging import stage_files

if TYPE_CHECKING:
    from repvgg_deploy.quantize.quantized_net import QuantizationSummary

Say = Callable[[str], None]
Report = Callable[[str, float], None]


def quantize_for_export(
    fused: RepVGG, request: Int8Request, preprocessing: Preprocessing, sha256: str, say: Say, report: Report
) -> tuple[QuantizedNet, QuantizationSummary]:
    """`fused` in INT8 as `request` says; `sha256` is the checkpoint's, which a calibration cache belongs to.

    Raises:
        DeployError: there are no images, only broken ones, or the recipe or the cache does not fit.
    """
    recipe = load_recipe(request.recipe)
    if request.count is not None:
        recipe = replace(recipe, count=request.count)
    images = choose_images(request.images, recipe.count, recipe.seed, preprocessing, say)

    def progress(step: str, done: int, total: int) -> None:
        report(step, done / total if total else 0.0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        statistics = _statistics(fused, images, request.cache, sha256, progress)
        quantized = quantize(fused, images, recipe, statistics, request.keep_float, progress)
    for warning in caught:
        say(f"warning: {warning.message}")
    for reason in images.broken.reasons.values():
        say(f"left out: {reason}")
    if quantized.summary is None:
        raise AssertionError("quantize() gives a summary")
    return quantized, quantized.summary


def _statistics(
    fused: RepVGG,
    images: CalibrationImages,
    cache: Path | None,
    sha256: str,
    progress: Callable[[str, int, int], None],
) -> CalibrationStatistics:
    """The statistics of the cache, where it holds those of this checkpoint; else they are taken now and kept there."""
    if cache is not None and cache.exists():
        return CalibrationStatistics.load(cache, sha256)
    seen = 0

    def count(number: int) -> None:
        nonlocal seen
        seen += number
        progress("calibrating", seen, len(images.paths))

    try:
        statistics = collect_statistics(fused, images, sha256, progress=count)
    except DeployError:
        if images.broken.reasons and len(images.broken.reasons) == len(images.paths):
            reason = next(iter(images.broken.reasons.values()))
            raise ImageError(f"none of the calibration images can be read: {reason}", "give another folder") from None
        raise
    if cache is not None:
        with stage_files(cache.absolute().parent) as staging:
            statistics.save(staging / cache.name)
    return statistics
