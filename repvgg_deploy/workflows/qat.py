"""`qat` as a command: a checkpoint in, one whose equivalent kernels were trained as integers out, with its scales."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from repvgg_deploy.artifacts import Parity, Preprocessing
from repvgg_deploy.benchmark.report.curves import draw_curves
from repvgg_deploy.checkpoints import Checkpoint, build, load_checkpoint
from repvgg_deploy.checkpoints.writing import describe_in_metadata, name_state_dict, write_state_dict
from repvgg_deploy.errors import DeployError, ImageError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.preprocessing import choose_preprocessing
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.settings import StructureOptions
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.quantization.calibration_images import CalibrationImages, choose_images
from repvgg_deploy.quantization.data_free import make_pictures
from repvgg_deploy.quantization.points import Images
from repvgg_deploy.quantization.qat import convert_qat
from repvgg_deploy.quantization.qat_best import BestState
from repvgg_deploy.quantization.qat_scales import ScalesOrigin, TrainedAs, apply_scales, save_scales
from repvgg_deploy.quantization.qat_start import empty_start, start_training
from repvgg_deploy.quantization.qat_training import QatTraining, set_saturation
from repvgg_deploy.quantization.recipe import load_recipe
from repvgg_deploy.quantization.target import UNSIGNED_HIGHEST
from repvgg_deploy.verification.parity import compare, require_parity
from repvgg_deploy.workflows.choices import warn_of_choices
from repvgg_deploy.workflows.qat_checks import layout_to_write, load_trainable
from repvgg_deploy.workflows.qat_images import (
    TrainingImages,
    hold_out,
    image_limits,
    known_classes,
    made_images,
    read_training_images,
)
from repvgg_deploy.workflows.qat_request import QatRequest, QatResult, curves_path, scales_path, state_path
from repvgg_deploy.workflows.qat_rows import describe_row, measure_row, to_csv
from repvgg_deploy.workflows.qat_state import SavedRun, load_run, save_run

_MAX_RELATIVE = 1e-1
_VALIDATION = 2000
_SEEN = 64


def run_qat(request: QatRequest, progress: Progress = SILENT) -> QatResult | None:
    """Train, and write the checkpoint and its scales; the result, or None in all but the first process of torchrun.

    A run that was stopped continues from its last saved state, with the same final result.

    Raises:
        DeployError: any error that the user can fix; the output is not touched then.
    """
    full_range = request.options.full_range or load_recipe(request.recipe).full_range
    request = replace(request, options=replace(request.options, full_range=full_range))
    with _processes(request.device) as rank:
        return _run(request, progress if rank == 0 else SILENT, rank)


def _run(request: QatRequest, progress: Progress, rank: int) -> QatResult | None:
    start = time.perf_counter()
    checkpoint = load_trainable(request)
    preprocessing = choose_preprocessing(checkpoint.spec, request.preprocessing, checkpoint.settings)
    for warning in warn_of_choices(checkpoint, preprocessing, request.preprocessing):
        progress.note(f"warning: {warning}")
    net = build(checkpoint).float()
    images = hold_out(_training_images(request, checkpoint, net, preprocessing, progress))
    request = _with_steps(request, len(images))
    validation = None
    if request.validation is not None and rank == 0:
        validation = read_training_images(request.validation, preprocessing, _VALIDATION, known_classes(checkpoint))
        _tell_left_out(validation.left_out, request, progress)
    best = BestState(images.held_out, images.held_out_labels)
    identity = _identity(request, checkpoint, images.images)
    read = [images.images] if validation is None else [images.images, validation]
    _tell_newly_broken(read, request, progress)
    if state_path(request.output).exists():
        run = _continue(request, identity, net, best, progress)
    else:
        run = _Run(_begin(request, net, preprocessing, progress), best, [])
    resumed = run.training.done
    limits = image_limits(preprocessing)
    steps = request.training.steps
    every = max(1, steps // 10)
    if rank == 0 and not run.rows:
        _look(run, validation, progress)
        _save(run, request, identity)
    saved = time.perf_counter()
    while run.training.done < steps:
        taken = run.training.step(images.take, len(images), limits)
        done = run.training.done
        if not math.isfinite(taken["loss"]):
            raise DeployError(f"the loss of step {done} is not finite", "a lower --rate; delete the saved run")
        progress.step("training", done, steps)
        _tell_newly_broken(read, request, progress)
        if rank != 0:
            continue
        if done % every == 0 or done == steps:
            _look(run, validation, progress)
        if done == steps or time.perf_counter() - saved >= request.interval_s:
            _save(run, request, identity)
            saved = time.perf_counter()
    if rank != 0:
        return None
    run.best.put_into(run.training)
    if run.best.step != steps:
        progress.note(f"the best state, that of step {run.best.step}, is kept")
    written = _write(request, checkpoint, run, images.images, progress)
    state_path(request.output).unlink(missing_ok=True)
    paths = (request.output, scales_path(request.output), curves_path(request.output))
    seconds = round(time.perf_counter() - start, 1)
    return QatResult(*paths, written.picture, steps, run.best.step, resumed, tuple(run.rows), written.parity, seconds)


@dataclass
class _Run:
    training: QatTraining
    best: BestState
    rows: list[dict[str, float]]


def _look(run: _Run, validation: TrainingImages | None, progress: Progress) -> None:
    run.rows.append(measure_row(run.training, run.best, validation))
    progress.note(describe_row(run.rows[-1]))


@contextmanager
def _processes(device: str) -> Iterator[int]:
    """The rank of this process; under torchrun the processes know each other inside."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _training_images(
    request: QatRequest, checkpoint: Checkpoint, net: RepVGG, preprocessing: Preprocessing, progress: Progress
) -> TrainingImages:
    if request.data is None:
        recipe = load_recipe(request.recipe)
        progress.note("no images to train on: synthesizing images from the BN statistics")
        made = make_pictures(net, preprocessing, recipe.pictures, recipe.seed, progress=progress)
        return made_images(made, preprocessing)
    classes = known_classes(checkpoint) if request.training.labels > 0 else None
    images = read_training_images(request.data, preprocessing, None, classes)
    _tell_left_out(images.left_out, request, progress)
    size = f"{preprocessing.height}x{preprocessing.width} px"
    progress.note(f"training on {len(images)} images of {request.data}, read as {size}")
    return images


def _tell_left_out(reasons: Iterable[str], request: QatRequest, progress: Progress) -> None:
    for reason in reasons:
        if request.strict:
            raise ImageError(reason, "remove it, or leave --strict out to skip such images")
        progress.note(f"left out: {reason}")


def _tell_newly_broken(images: Iterable[TrainingImages], request: QatRequest, progress: Progress) -> None:
    for some in images:
        _tell_left_out(some.newly_broken(), request, progress)


def _with_steps(request: QatRequest, count: int) -> QatRequest:
    if request.epochs is None:
        return request
    steps = max(1, request.epochs * count // request.training.batch)
    return replace(request, training=replace(request.training, steps=steps))


def _begin(request: QatRequest, net: RepVGG, preprocessing: Preprocessing, progress: Progress) -> QatTraining:
    """A new run."""
    recipe = load_recipe(request.recipe)
    calibration: Images
    if request.calibration is None:
        progress.note("no calibration images: synthesizing images from the BN statistics")
        calibration = make_pictures(net, preprocessing, recipe.pictures, recipe.seed, progress=progress)
    else:
        calibration = choose_images(request.calibration, recipe.count, recipe.seed, preprocessing, progress)
        if request.strict:
            # Before calibration, which takes minutes, rather than after it.
            for _ in calibration:
                pass
            _tell_left_out(calibration.broken.reasons.values(), request, progress)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        begun = start_training(net, calibration, recipe, request.options, progress)
    for warning in caught:
        progress.note(f"warning: {warning.message}")
    if isinstance(calibration, CalibrationImages):
        _tell_left_out(calibration.broken.reasons.values(), request, progress)
    return QatTraining(begun.student.to(request.device), begun.teacher.to(request.device), request.training)


def _continue(request: QatRequest, identity: str, net: RepVGG, best: BestState, progress: Progress) -> _Run:
    """The run whose state was saved."""
    begun = empty_start(net, request.options)
    training = QatTraining(begun.student.to(request.device), begun.teacher.to(request.device), request.training)
    saved = load_run(state_path(request.output), identity, training)
    training.teacher.net.load_state_dict(saved.teacher)
    training.restore(saved.training)
    best.restore(saved.best)
    progress.note(f"continuing after step {saved.training.done}")
    return _Run(training, best, list(saved.rows))


def _identity(request: QatRequest, checkpoint: Checkpoint, images: TrainingImages) -> str:
    """The sha256 of what must be the same for a run to continue."""
    values = asdict(replace(request, output=Path(), interval_s=0.0, validation=None))
    # It decides whether a run ends, not what it computes.
    del values["strict"]
    recipe = str(load_recipe(request.recipe))
    read = {"checkpoint sha256": checkpoint.sha256, "images": images.names_sha256, "contents of the recipe": recipe}
    text = json.dumps({**read, **{name: str(value) for name, value in values.items()}})
    return hashlib.sha256(text.encode()).hexdigest()


def _save(run: _Run, request: QatRequest, identity: str) -> None:
    teacher = run.training.teacher.net.state_dict()
    saved = SavedRun(identity, tuple(run.rows), run.training.state(), teacher, run.best.state())
    path = state_path(request.output).absolute()
    with stage_files(path.parent, is_result=False) as staging, (staging / path.name).open("wb") as file:
        save_run(saved, file)


@dataclass(frozen=True)
class _Written:
    parity: Parity
    picture: Path | None


def _write(
    request: QatRequest, checkpoint: Checkpoint, run: _Run, images: TrainingImages, progress: Progress
) -> _Written:
    """Write all files once the INT8 net that a reader gets from them computes what was trained."""
    student = run.training.student.eval().cpu()
    set_saturation(student, UNSIGNED_HIGHEST)
    converted, scales = convert_qat(student)
    trained = cast(RepVGG, converted)
    if request.from_deploy:
        trained = fuse(trained, torch.float32)
    sample, _ = images.take(torch.arange(min(_SEEN, len(images))))
    target = request.output.absolute()
    with stage_files(target.parent) as staging, torch.no_grad():
        state = name_state_dict(trained, layout_to_write(checkpoint))
        images_as = replace(request.preprocessing, size=None, resize=None, crop_ratio=None)
        write_state_dict(state, staging / target.name, describe_in_metadata(checkpoint, images_as))
        spec = checkpoint.spec
        same = StructureOptions(spec.strides, str(spec.activation), spec.bn_eps)
        again = build(load_checkpoint(staging / target.name, structure=same))
        fused = again if request.from_deploy else fuse(again, torch.float32)
        trained_as = TrainedAs.of(spec, images.preprocessing)
        origin = ScalesOrigin(str(request.recipe), request.training.steps, request.training.seed, trained_as)
        sha256 = hash_file(staging / target.name)
        save_scales(scales, staging / scales_path(target).name, sha256, origin)
        parity = compare(_run_net(student, sample), _run_net(apply_scales(fused, scales), sample))
        require_parity("the written file", parity, _MAX_RELATIVE)
        picture = _write_curves(run, staging / curves_path(target).name, progress)
    return _Written(parity, None if picture is None else request.output.with_name(picture.name))


def _write_curves(run: _Run, path: Path, progress: Progress) -> Path | None:
    """Write the learning curves as a table, and draw them beside it if matplotlib is installed."""
    path.write_text(to_csv(run.rows), encoding="utf-8")
    try:
        return draw_curves(path)
    except DeployError as error:
        progress.note(f"note: the learning curves were not plotted: {error.message}")
        return None


def _run_net(net: nn.Module, images: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return cast("np.ndarray[Any, np.dtype[np.float32]]", net(images).numpy())
