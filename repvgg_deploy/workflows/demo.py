"""The whole path on the embedded model: synthesize images, load, fuse, export, verify, evaluate, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from repvgg_deploy.artifacts import Array, Precision, PreprocessingOptions
from repvgg_deploy.benchmark.measure import measure_interleaved
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.files.staging import scratch_folder
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.graphs.training import to_training_onnx
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.images.sources import list_images
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.nets.preprocessing import choose_preprocessing
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.runtime.base import Runner
from repvgg_deploy.runtime.model import Model, open_model
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.runtime.torch import TorchRunner
from repvgg_deploy.workflows.demo_picture import write_predictions
from repvgg_deploy.workflows.evaluate import evaluate
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_request import ExportRequest, Int8Request

# The checkpoint was trained on the pictures of seed 1 and its published accuracy is that of seed 2.
_SEED = 3
_CALIBRATION_SEED = 4
_CALIBRATION_IMAGES = 256
_IMAGES = 1200
_BATCH = 32
_ROUNDS = 15
# ONNX Runtime's threads spin for 50 ms after a run, and would take a core from the next one.
_PAUSE_S = 0.1
PICTURE = "predictions.png"


@dataclass(frozen=True)
class DemoRow:
    """One form of the demo model; `ratio` is its speed over that of the training form in the same backend."""

    form: str
    backend: str
    precision: str
    top1: float
    images_per_sec: float
    ratio: float
    relative: float | None
    megabytes: float | None


@dataclass(frozen=True)
class DemoResult:
    """The table of `demo`; `failures` has the reason for each form that could not be made, by its name.

    `files` are those that were written to the folder that was requested.
    """

    rows: tuple[DemoRow, ...]
    failures: dict[str, str]
    images: int
    batch: int
    seconds: float
    files: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The object that `demo --json` prints."""
        return {**vars(self), "rows": [vars(row) for row in self.rows], "files": list(self.files)}


def run_demo(output: Path | None = None, progress: Progress = SILENT) -> DemoResult:
    """Take the embedded model from checkpoint to ONNX, and compare every form of it.

    The accuracy is measured on synthetic images that are made now and that the training has not seen. With `output`
    the ONNX graphs are kept there, and a picture of one image per class with the model's answer. A form whose export
    fails is left out of the table, and `failures` says why.
    """
    start = time.perf_counter()
    with scratch_folder() as scratch:
        data = scratch / "images"
        progress.note(f"making {_IMAGES} synthetic images")
        write_image_folder(data, _IMAGES, seed=_SEED, size=64)
        forms, relatives, failures = _make_forms(output or scratch, scratch, progress)
        progress.note("evaluating")
        top1 = {name: evaluate(model, data).top1 for name, model in forms.items()}
        progress.note("timing the forms in turn")
        speeds = _time_forms(forms, data)
        rows = tuple(
            DemoRow(
                form=form,
                backend=model.runner.backend,
                precision=model.runner.precision,
                top1=top1[form, family],
                images_per_sec=round(speeds[form, family], 1),
                ratio=round(speeds[form, family] / speeds["training", family], 3),
                relative=relatives.get((form, family)),
                megabytes=round(model.path.stat().st_size / 1e6, 3) if (form, family) in relatives else None,
            )
            for (form, family), model in forms.items()
        )
        files = () if output is None else _write_picture(output, forms)
    return DemoResult(rows, failures, _IMAGES, _BATCH, round(time.perf_counter() - start, 1), files)


def _write_picture(output: Path, forms: Mapping[Name, Model]) -> tuple[str, ...]:
    """Write the picture of predictions; the files that are in `output` now."""
    picture = output / PICTURE
    exported = [model for model in forms.values() if model.path.parent == output]
    write_predictions(exported[-1] if exported else next(iter(forms.values())), picture, _SEED)
    return tuple(str(path) for path in (*(model.path for model in exported), picture))


Name = tuple[str, str]


def _make_forms(
    output: Path, scratch: Path, progress: Progress
) -> tuple[dict[Name, Model], dict[Name, float], dict[str, str]]:
    """Every form ready to run, how far the logits of the exported ones are from the fused net's, and what failed."""
    path = data_folder("models") / "demo.safetensors"
    progress.note(f"loading {path.name}")
    checkpoint = load_checkpoint(path)
    preprocessing = choose_preprocessing(checkpoint.spec, PreprocessingOptions(), checkpoint.settings)
    net = build(checkpoint)
    fused = fuse(net)

    def model(runner: Runner, source: Path) -> Model:
        return Model(source, runner, preprocessing, checkpoint.class_names, checkpoint.spec.classes)

    training = scratch / "training.onnx"
    write_graph(to_training_onnx(net, GraphOptions(preprocessing.height, preprocessing.width)), training)
    forms = {
        ("training", "torch"): model(TorchRunner(net), path),
        ("fused", "torch"): model(TorchRunner(fused), path),
        ("training", "onnx"): model(OnnxRunner(training), training),
    }
    relatives: dict[Name, float] = {}
    failures: dict[str, str] = {}
    calibration = scratch / "calibration"
    write_image_folder(calibration, _CALIBRATION_IMAGES, seed=_CALIBRATION_SEED, size=64)
    for precision in Precision:
        progress.note(f"exporting and verifying {precision}")
        int8 = Int8Request(calibration) if precision is Precision.INT8 else None
        name = ("fused" if precision is Precision.FP32 else f"fused {precision}", "onnx")
        try:
            result = export(ExportRequest(path, output, precision=precision, int8=int8))
        except DeployError as error:
            failures[name[0]] = error.message
            continue
        forms[name] = open_model(result.onnx)
        relatives[name] = result.parity["quantized" if int8 is not None else "onnx"].relative
    return forms, relatives, failures


def _time_forms(forms: Mapping[Name, Model], data: Path) -> dict[Name, float]:
    """Images per second of each form, from the median time of a batch, measured in turn with all others."""
    first = next(iter(forms.values()))
    paths = list_images(data)[:_BATCH]
    pixels, _ = next(read_batches(paths, first.preprocessing, _BATCH, BrokenImages()))
    images: Array = normalize(pixels, first.preprocessing)
    runs = {"/".join(name): _bind(model, images) for name, model in forms.items()}
    with torch.inference_mode():
        times = measure_interleaved(runs, _ROUNDS, pause_s=_PAUSE_S)
    return {name: _BATCH / median(times["/".join(name)]) for name in forms}


def _bind(model: Model, images: Array) -> Callable[[], object]:
    return lambda: model.run_images(images)
