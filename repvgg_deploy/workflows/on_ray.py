"""`predict` and `eval` on a Ray cluster; what they give is what one process gives."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.errors import DeployError, ImageError, VerificationError
from repvgg_deploy.files.abort import undone_on_abort
from repvgg_deploy.images.labelled import list_labelled_images
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.serving import PredictorSpec
from repvgg_deploy.serving.predictor import NOT_FINITE
from repvgg_deploy.serving.ray_cluster import (
    RayOptions,
    connect,
    describe_on_cluster,
    explain_failures,
    predict_dataset,
)
from repvgg_deploy.serving.tables import import_pyarrow
from repvgg_deploy.workflows.evaluate import Evaluation, Hits, map_classes
from repvgg_deploy.workflows.predict import PredictRequest, PredictSummary, find_sources

_LOOK = "compare it with its checkpoint: `verify`"


def predict_on_ray(request: PredictRequest, cluster: RayOptions, progress: Progress = SILENT) -> PredictSummary:
    """Write the predictions as a folder of Parquet files, `part-00000.parquet` and on, in the order of the images.

    All nodes must see the images, the model and the output under the same paths. The folder appears when it has a row
    for every image.

    Raises:
        ImageError: there is no image, or a broken one with `strict`.
        DeployError: there is no cluster, the work failed there, or the output exists already.
    """
    arrow = import_pyarrow()
    images = find_sources(request.images)
    start = time.perf_counter()
    with _new_folder(request.output) as folder, connect(cluster) as ray, explain_failures(ray):
        facts = describe_on_cluster(ray, request.spec, cluster)
        progress.note(f"running {len(images):,} images on {cluster.actors} actors")
        predict_dataset(ray, request.spec, images, cluster).write_parquet(str(folder))
        parts = _order_parts(folder, len(images), arrow)
        errors = _read_errors(parts, arrow)
        if request.strict and errors:
            raise ImageError(errors[0], "remove it, or leave --strict out to have its error in its row")
        if len(errors) == len(images) and NOT_FINITE in errors:
            raise VerificationError(f"{request.spec.model} gives NaN or Inf for every image", _LOOK)
        for number, part in enumerate(parts):
            part.rename(folder / f"part-{number:05}.parquet")
    seconds = time.perf_counter() - start
    return PredictSummary(
        model=str(request.spec.model),
        file=str(request.output),
        backend=f"{facts.backend} on ray",
        precision=facts.precision,
        images=len(images),
        broken=len(errors),
        resumed=0,
        images_per_sec=round(len(images) / seconds, 1),
        decoder=request.spec.options.decoding.library,
    )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` when the block ends, or is removed after an error."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DeployError(f"{output} already exists", "choose another -o: Ray writes a new folder of Parquet files")
    folder = output.absolute().with_name(f"{output.name}.partial")
    try:
        # Left by a run that was killed.
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise DeployError(f"cannot write to {folder}: {error.strerror}", "choose another -o") from error
    try:
        with undone_on_abort(lambda: shutil.rmtree(folder, ignore_errors=True)):
            yield folder
            # A folder can replace nothing but an empty folder.
            folder.replace(output)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _order_parts(folder: Path, images: int, arrow: Any) -> list[Path]:
    """The files in the order of their rows.

    Raises:
        DeployError: an image is missing, or is there twice.
    """
    found = {path: arrow.parquet.read_table(path, columns=["index"])["index"].to_pylist() for path in folder.iterdir()}
    parts = sorted((path for path, index in found.items() if index), key=lambda path: found[path][0])
    if [number for part in parts for number in found[part]] != list(range(images)):
        raise DeployError(
            "the cluster did not return each image exactly once",
            "write to a folder that all nodes see under the same path",
        )
    for path in found.keys() - set(parts):
        path.unlink()
    return parts


def _read_errors(parts: list[Path], arrow: Any) -> list[str]:
    tables = (arrow.parquet.read_table(part, columns=["error"]) for part in parts)
    return [error for table in tables for error in table["error"].to_pylist() if error is not None]


@dataclass(frozen=True)
class RayEvaluationRequest:
    """What `eval` measures on a cluster: a model on labelled images, as `evaluate` does here."""

    spec: PredictorSpec
    folder: Path
    ground_truth: Path | None = None
    strict: bool = False


def evaluate_on_ray(request: RayEvaluationRequest, cluster: RayOptions, progress: Progress = SILENT) -> Evaluation:
    """The accuracy of a model on labelled images, as `evaluate`.

    Raises:
        ImageError: no images, broken ones with `strict`, or nothing but broken ones.
        VerificationError: the scores are NaN or infinite, or do not depend on the image.
        DeployError: there is no cluster, the work failed there, or the labels cannot be the model's classes.
    """
    images = list_labelled_images(request.folder, request.ground_truth)
    spec = replace(request.spec, options=replace(request.spec.options, topk=5, output="classes"))
    broken = {str(entry): f"{entry} cannot be read ({entry.reason})" for entry in images.unreadable}
    hits = Hits()
    answers: set[tuple[tuple[int, ...], tuple[float, ...]]] = set()
    start = time.perf_counter()
    with connect(cluster) as ray, explain_failures(ray):
        facts = describe_on_cluster(ray, spec, cluster)
        to_class = map_classes(images, facts.class_names, facts.classes)
        progress.note(f"running {len(images.paths):,} images on {cluster.actors} actors")
        for row in predict_dataset(ray, spec, images.paths, cluster).iter_rows():
            if row["error"] == NOT_FINITE:
                raise VerificationError(f"{spec.model} gives NaN or Inf in place of scores", _LOOK)
            if row["error"] is not None:
                broken[row["path"]] = row["error"]
                continue
            truth = to_class[[images.labels[row["index"]]]]
            hits = hits.add(np.asarray(row["classes"])[None], truth)
            if len(answers) < 2:
                answers.add((tuple(row["classes"]), tuple(row["scores"])))
    if broken and (request.strict or not hits.count):
        raise ImageError(next(iter(broken.values())), "remove it, or leave --strict out to skip such images")
    if hits.count > 1 and len(answers) == 1 and hits.width > 1:
        raise VerificationError(f"the scores that {spec.model} gives do not depend on the image", _LOOK)
    return Evaluation(
        model=str(spec.model),
        backend=f"{facts.backend} on ray",
        precision=facts.precision,
        images=hits.count,
        top1=hits.top1,
        top5=hits.top5,
        images_per_sec=round(hits.count / (time.perf_counter() - start), 1),
        broken=broken,
        decoder=spec.options.decoding.library,
    )
