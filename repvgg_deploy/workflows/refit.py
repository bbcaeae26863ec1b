"""`refit`: the weights of a checkpoint or of an ONNX graph instead of an engine's own, verified as after a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.artifacts import Precision, Preprocessing, PreprocessingOptions
from repvgg_deploy.checkpoints import CheckpointOptions
from repvgg_deploy.engine.building import Engine
from repvgg_deploy.engine.refit import graph_options, refit_engine, require_refittable
from repvgg_deploy.engine.sidecar import Sidecar
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import file_kind
from repvgg_deploy.files.staging import scratch_folder, stage_files
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.images.synthetic import draw_images
from repvgg_deploy.nets.settings import recorded_structure
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.verification.engine import check_where_possible, run_as_engine
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_request import ExportRequest, GraphRequest


def refit_in_place(plan: Path, weights: Path, progress: Progress = SILENT) -> Engine:
    """Replace the plan and its sidecar by those with the weights of a checkpoint, or of an ONNX graph.

    Raises:
        DeployError: as `refit_engine`, and as `export` for a checkpoint; the files are as they were then.
    """
    side = require_refittable(plan)
    with scratch_folder() as scratch:
        onnx = weights if file_kind(weights) == "onnx" else export_for_refit(side, weights, scratch, progress)
        with stage_files(plan.absolute().parent) as staging:
            engine = refit_engine(plan, onnx, staging)
            _check_refitted(engine, onnx, progress)
    return Engine(plan, engine.side)


def _check_refitted(engine: Engine, onnx: Path, progress: Progress) -> None:
    """The comparison that follows every build, on synthetic images, or on noise where the net takes no RGB."""
    side, images = engine.side, engine.side.inputs[0]
    takes_pixels = images.dtype == "uint8"
    batch, *rest = images.shape
    height, width, channels = rest if takes_pixels else (rest[1], rest[2], rest[0])
    count = batch if batch > 0 else 4
    taken: Any = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    if channels == 3:
        taken = draw_images(count, seed=0, size=max(height, width, 8))[0][:, :height, :width]
    if not takes_pixels:
        known = side.provenance.preprocessing if side.provenance is not None else None
        half = (0.5,) * channels
        taken = normalize(taken, known or Preprocessing(height, width, max(height, width), half, half))
        taken = taken.astype(images.dtype)
    check_where_possible(engine, taken, lambda: run_as_engine(onnx, taken), progress)


def export_for_refit(side: Sidecar, checkpoint: Path, folder: Path, progress: Progress) -> Path:
    """The verified ONNX graph of `checkpoint` in `folder`, with the options of the engine's own graph.

    Raises:
        DeployError: the engine is INT8, or the checkpoint cannot be exported so.
    """
    options = graph_options(side)
    assert side.provenance is not None  # graph_options has made sure.
    if side.provenance.precision is Precision.INT8:
        raise DeployError(
            "the scales of an INT8 engine come from a calibration, not from a checkpoint",
            "export the checkpoint with --int8 --calib DIR --engine none, and refit from that ONNX graph",
        )
    images = side.provenance.preprocessing
    request = ExportRequest(
        checkpoint=checkpoint,
        output=folder,
        precision=side.provenance.precision,
        preprocessing=PreprocessingOptions((options.height, options.width))
        if images is None
        else PreprocessingOptions.same_as(images),
        graph=GraphRequest(
            batch=options.batch,
            io=options.io,
            uint8_input=options.uint8_input is not None,
            softmax=options.softmax,
            topk=options.topk,
            features=_features(side.provenance.extra.get("outputs")),
        ),
        source=CheckpointOptions(structure=recorded_structure(side.provenance.extra.get("assumed"))),
    )
    return export(request, progress).onnx


def _features(outputs: object) -> tuple[int, ...] | None:
    """The `--features` of a graph, by its metadata: the stages of its maps, () for pooled features, or None."""
    if not isinstance(outputs, list):
        return None
    return tuple(int(str(name).removeprefix("stage")) for name in outputs if str(name).startswith("stage"))
