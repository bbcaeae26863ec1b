"""The INT8 stage of an export: calibration images, statistics, recipe, and the quantized net."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from repvgg_deploy.artifacts import Precision, Preprocessing
from repvgg_deploy.errors import DeployError, ImageError, ThresholdError
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.progress import Progress
from repvgg_deploy.quantization import (
    CalibrationStatistics,
    QuantizedNet,
    Recipe,
    collect_statistics,
    load_recipe,
    quantize,
)
from repvgg_deploy.quantization.calibration_images import CalibrationImages, choose_images
from repvgg_deploy.quantization.data_free import MadePictures, make_pictures
from repvgg_deploy.quantization.mixed_precision import DropLimit, quantize_within
from repvgg_deploy.quantization.net import QuantizationSummary
from repvgg_deploy.quantization.qat_scales import ScalesOrigin, TrainedAs, apply_scales, load_scales
from repvgg_deploy.quantization.qdq import with_fp16_scales
from repvgg_deploy.quantization.target import unsigned_points
from repvgg_deploy.runtime.model import Model
from repvgg_deploy.runtime.torch import TorchOptions, TorchRunner
from repvgg_deploy.workflows.evaluate import Evaluation, evaluate
from repvgg_deploy.workflows.export_request import Int8Request


@dataclass(frozen=True)
class Int8Source:
    """What is quantized: `fused`, of a checkpoint with this `sha256`, for images prepared by `preprocessing`.

    `training` is the net in training form, if images are synthesized from its BN statistics.
    """

    fused: RepVGG
    training: RepVGG | None
    preprocessing: Preprocessing
    sha256: str


def quantize_for_export(
    source: Int8Source, request: Int8Request, for_engine: bool, progress: Progress
) -> tuple[QuantizedNet, QuantizationSummary]:
    """The fused net in INT8 as `request` says; a calibration cache belongs to its checkpoint.

    Where layers are kept float for a given drop, that is measured as an engine computes, or else as ONNX Runtime does.

    Raises:
        DeployError: there are no images, only broken ones, or the recipe or the cache does not fit.
    """
    if request.device == "cuda" and not torch.cuda.is_available():
        raise DeployError("torch sees no CUDA GPU here", "leave out --calib-device, or install torch for CUDA")
    trained = _find_scales(source, request, for_engine)
    if trained is not None:
        return trained
    recipe = load_recipe(request.recipe)
    recipe = replace(recipe, full_range=recipe.full_range or request.full_range)
    images = _find_images(source, request, recipe, progress)
    # The caller's net stays where it is.
    fused = source.fused if request.device == "cpu" else copy.deepcopy(source.fused).to(request.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        statistics = _statistics(fused, images, recipe.augmentations, request.cache, source.sha256, progress)
        if request.max_drop is None or request.validation is None:
            quantized = quantize(fused, images, recipe, statistics, request.keep_float, progress)
        else:
            drop = _Drop(replace(source, fused=fused), request, for_engine, progress)
            quantized = _quantize_within(drop, images, recipe, statistics)
    # Each attempt at a given drop warns anew.
    told = tuple(dict.fromkeys(str(warning.message) for warning in caught))
    for warning in told:
        progress.note(f"warning: {warning}")
    if isinstance(images, CalibrationImages):
        for reason in images.broken.reasons.values():
            progress.note(f"left out: {reason}")
    if quantized.summary is None:
        raise AssertionError("quantize() gives a summary")
    quantized.summary = replace(quantized.summary, warnings=told)
    if isinstance(images, MadePictures):
        quantized.summary = replace(quantized.summary, images=0, pictures=images.summary)
    return quantized.cpu(), quantized.summary


def _find_scales(
    source: Int8Source, request: Int8Request, for_engine: bool
) -> tuple[QuantizedNet, QuantizationSummary] | None:
    """The net with the scales that `qat` learned, where the request names some; nothing is calibrated then."""
    path = request.scales or request.cache
    found = None if path is None else load_scales(path, source.sha256)
    if found is None:
        if request.scales is not None:
            raise DeployError(
                f"{path} does not contain the scales of a qat run", "give --calib DIR as well, to calibrate"
            )
        return None
    if request.keep_float or request.max_drop is not None:
        raise DeployError(
            "every layer was trained in INT8", "leave out --keep-float and --max-drop, or calibrate with --calib DIR"
        )
    scales, origin = found
    _require_same_net(path, origin, source)
    # Where no activation is after a ReLU, both ranges are the same.
    if request.full_range and not scales.full_range and unsigned_points(source.fused):
        raise DeployError(
            f"the scales in {path} are for activations up to 127",
            "train with --full-range; or calibrate: --full-range --calib DIR, without these scales",
        )
    if scales.full_range and (for_engine or request.activation_type == "int8"):
        raise DeployError(
            f"the scales in {path} are for activations up to 255, and TensorRT saturates at 127",
            "--engine none, for ONNX Runtime or OpenVINO; or train without --full-range",
        )
    summary = QuantizationSummary(
        origin.recipe, 0, "", origin.seed, (), trained_steps=origin.steps, full_range=scales.full_range
    )
    return apply_scales(source.fused, scales, summary), summary


def _require_same_net(path: Path | None, origin: ScalesOrigin, source: Int8Source) -> None:
    """Raise DeployError if the checkpoint is read as another net than the scales were learned for."""
    other = origin.trained_as.differences(TrainedAs.of(source.fused.spec, source.preprocessing))
    if not other:
        return
    options = {"activation": "act", "bn_eps": "bn-eps", "color_order": "color-order"}
    said = ", ".join(f"{name} {value}" for name, value in other.items())
    hint = " ".join(f"--{options.get(name, name)} {value}" for name, value in other.items())
    raise DeployError(f"the scales in {path} were learned for another net or other images: {said}", hint)


def _find_images(
    source: Int8Source, request: Int8Request, recipe: Recipe, progress: Progress
) -> CalibrationImages | MadePictures:
    """The user's calibration images, or images synthesized now."""
    if request.images is not None:
        return choose_images(request.images, request.count or recipe.count, recipe.seed, source.preprocessing, progress)
    if source.training is None:
        raise DeployError("no calibration images are given", "--calib DIR, a folder of a few hundred typical images")
    options = recipe.pictures if request.count is None else replace(recipe.pictures, count=request.count)
    progress.note("no calibration images: synthesizing images from the BN statistics")
    net = copy.deepcopy(source.training).to(request.device)
    made = make_pictures(net, source.preprocessing, options, recipe.seed, request.seconds, progress)
    about = made.summary
    size = f"{about.height}x{about.width} pixels"
    change = f"distance {about.distance:.3g}, from {about.start_distance:.3g}"
    progress.note(f"synthesized {about.pictures} images of {size}: {change}")
    if about.cut_short:
        progress.note(
            f"warning: the time limit ended the synthesis after {about.steps} of {options.steps} steps; "
            "the images may be poor"
        )
    return made


class _Drop:
    """The points of top-1 that a quantized net loses on the labelled images of the request."""

    def __init__(self, source: Int8Source, request: Int8Request, for_engine: bool, progress: Progress) -> None:
        self.source = source
        self.request = request
        self.progress = progress
        self._as_tensorrt = for_engine or request.activation_type == "int8"
        exact = self._evaluate(source.fused)
        for reason in exact.broken.values():
            progress.note(f"left out: {reason}")
        self._exact = exact.top1

    def measure(self, net: QuantizedNet) -> float:
        """What `net` loses, as it will be run."""
        if self.request.rest is Precision.FP16:
            net = with_fp16_scales(net)
        drop = self._exact - self._evaluate(net.as_tensorrt() if self._as_tensorrt else net).top1
        kept = len(net.float_layers())
        self.progress.note(f"{kept} layers in float: top-1 drops by {drop:.2f} points from {self._exact:.2f} %")
        return drop

    def _evaluate(self, net: nn.Module) -> Evaluation:
        validation = self.request.validation
        if validation is None:
            raise AssertionError("a drop is measured on labelled images")
        device, spec = self.source.fused.device.type, self.source.fused.spec
        runner = TorchRunner(net, None if device == "cpu" else TorchOptions(device))
        model = Model(validation, runner, self.source.preprocessing, None, spec.classes, spec.in_channels)
        return evaluate(model, validation)


def _quantize_within(
    drop: _Drop, images: CalibrationImages | MadePictures, recipe: Recipe, statistics: CalibrationStatistics
) -> QuantizedNet:
    """The net with the fewest float layers that loses at most `max_drop` points of top-1.

    Raises:
        ThresholdError: no candidate loses less; see `quantize_within`.
    """
    request, most = drop.request, drop.request.max_drop
    if most is None:
        raise AssertionError("a limit is given")
    limit = DropLimit(drop.measure, most)
    mixed = quantize_within(drop.source.fused, images, recipe, limit, statistics, request.keep_float)
    if mixed.drop > most:
        raise ThresholdError(
            f"top-1 drops by {mixed.drop:.2f} points, more than {most:g}",
            "take more calibration images, --recipe thorough, or a larger --max-drop",
        )
    kept = ", ".join(mixed.kept_float) or "nothing"
    drop.progress.note(f"kept in float: {kept}, {mixed.macs_share:.1%} of the multiply-adds")
    return mixed.net


def _statistics(
    fused: RepVGG,
    images: CalibrationImages | MadePictures,
    augmentations: int,
    cache: Path | None,
    sha256: str,
    progress: Progress,
) -> CalibrationStatistics:
    """The statistics of the cache, where it holds those of this checkpoint; else they are taken now and kept there."""
    try:
        if cache is not None and cache.exists():
            return CalibrationStatistics.load(cache, fused, sha256, images)
        statistics = collect_statistics(fused, images, sha256, augmentations, progress, len(images))
    except DeployError:
        reasons = images.broken.reasons if isinstance(images, CalibrationImages) else {}
        if reasons and len(reasons) == len(images):
            reason = next(iter(reasons.values()))
            raise ImageError(f"none of the calibration images can be read: {reason}", "give another folder") from None
        raise
    if cache is not None:
        with stage_files(cache.absolute().parent, is_result=False) as staging:
            statistics.save(staging / cache.name)
    return statistics
