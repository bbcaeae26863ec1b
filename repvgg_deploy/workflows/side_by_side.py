"""Graphs of one net side by side: accuracy and agreement on the same images, and a short measurement of speed."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.benchmark.cases import Case
from repvgg_deploy.benchmark.measure import MeasureOptions
from repvgg_deploy.benchmark.run import BenchRequest, Group, run_benchmark
from repvgg_deploy.errors import ImageError
from repvgg_deploy.images.decoding import Pixels
from repvgg_deploy.images.labelled import list_labelled_images
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.progress import Progress, count_steps
from repvgg_deploy.runtime.model import Model, rank_classes
from repvgg_deploy.verification.inputs import choose_pixels
from repvgg_deploy.workflows.evaluate import Hits, ScoreCheck, map_classes

BACKEND = "onnxruntime-cpu"
NOT_MEASURED = "not measured: ONNX Runtime computes FP16 graphs in FP32 on this CPU"
# Its kernels for FP16 are for Arm; elsewhere each layer is converted to FP32 and back.
_MEASURES_FP16 = platform.machine().lower() in ("aarch64", "arm64")
_BATCH = 64
_IMAGES = 32
# A short measurement: every graph still has at least ten turns.
_MEASURE = MeasureOptions(min_duration_s=1.0)


@dataclass(frozen=True)
class Agreement:
    """What one graph makes of the images that all were run on; percentages.

    `top1` and `top5` are None where the images have no labels. `agreement` is the share of images with the same best
    class as the FP32 graph.
    """

    images: int
    agreement: float
    top1: float | None = None
    top5: float | None = None


def compare_accuracy(
    models: Mapping[Precision, Model], labelled: Path | None, data: Path | None, progress: Progress
) -> dict[Precision, Agreement]:
    """Every model on the same images: `labelled` ones with their classes, else those of `data`, else synthetic ones.

    Raises:
        ImageError: there is no image that can be read.
        VerificationError: a model's scores are NaN or infinite, or do not depend on the image.
        DeployError: the folders cannot be the model's classes.
    """
    hits = {precision: Hits() for precision in models}
    checks = {precision: ScoreCheck(str(model.path.name)) for precision, model in models.items()}
    same = dict.fromkeys(models, 0)
    images = 0
    for pixels, truth in _read(models[Precision.FP32], labelled, data, progress):
        images += len(pixels)
        ranked = {}
        for precision, model in models.items():
            outputs = model.run_pixels(pixels)
            checks[precision] = checks[precision].add(pixels, outputs)
            ranked[precision] = rank_classes(outputs, 5)
            same[precision] += int((ranked[precision][:, 0] == ranked[Precision.FP32][:, 0]).sum())
            if truth is not None:
                hits[precision] = hits[precision].add(ranked[precision], truth)
    for check in checks.values():
        check.require_dependence()
    return {
        precision: Agreement(
            images,
            round(100 * same[precision] / images, 4),
            hits[precision].top1 if hits[precision].count else None,
            hits[precision].top5 if hits[precision].count else None,
        )
        for precision in models
    }


def _read(
    model: Model, labelled: Path | None, data: Path | None, progress: Progress
) -> Iterator[tuple[Pixels, NDArray[np.int64] | None]]:
    """Batches of pixels, with the model's classes where they are known."""
    if labelled is None:
        yield choose_pixels(model.preprocessing, model.channels or 3, _IMAGES, data), None
        return
    images = list_labelled_images(labelled)
    to_class = map_classes(images, model.class_names, model.classes)
    advance = count_steps(progress, "evaluating", len(images.paths))
    broken, read = BrokenImages({entry: f"{entry} cannot be read ({entry.reason})" for entry in images.unreadable}), 0
    for pixels, indices in read_batches(images.paths, model.preprocessing, _BATCH, broken):
        read += len(indices)
        yield pixels, to_class[[images.labels[i] for i in indices]]
        advance(len(indices))
    for reason in broken.reasons.values():
        progress.note(f"warning: left out: {reason}")
    if not read:
        raise ImageError(f"none of the images of {labelled} can be read", "give another folder to --val")


@dataclass(frozen=True)
class Speed:
    """A short measurement in ONNX Runtime on the CPU; the figures are None where `note` says why."""

    images_per_sec: float | None = None
    latency_ms: float | None = None
    unstable: bool = False
    note: str = ""


@dataclass(frozen=True)
class Speeds:
    """The speed of each graph at one batch size, on the CPU `cpu`."""

    of: dict[Precision, Speed]
    batch: int
    backend: str
    cpu: str
    duration_s: float = _MEASURE.min_duration_s


def measure_speeds(graphs: Mapping[Precision, Path], batch: int, progress: Progress) -> Speeds:
    """The throughput of the graphs, which take turns; FP16 is left out where the CPU would compute it in FP32."""
    measured = [precision for precision in graphs if precision is not Precision.FP16 or _MEASURES_FP16]
    cases = tuple(Case(str(graphs[precision]), backend=BACKEND) for precision in measured)
    progress.note(f"measuring the speed of {' and '.join(map(str, measured))}")
    # Without the notes of `bench`, which would name files that are about to take their places elsewhere.
    record = run_benchmark(BenchRequest("export", (Group(f"batch {batch}", cases, batch),), _MEASURE))
    speeds = {precision: Speed(note=NOT_MEASURED) for precision in graphs}
    for precision, result in zip(measured, record["results"], strict=True):
        speed = Speed(result["images_per_sec"], result["latency_ms"]["p50"], result["unstable"])
        note = ", ".join([*(["unstable"] if speed.unstable else []), *result["notes"]])
        speeds[precision] = replace(speed, note=note)
    result = record["results"][0]
    label = f"{result['backend']} {result['backend_version']}"
    return Speeds(speeds, batch, label, str(record["machine"]["cpu"]["model"]))
