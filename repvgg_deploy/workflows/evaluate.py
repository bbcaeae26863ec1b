"""Accuracy of a model on labelled images."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.errors import DeployError, ImageError
from repvgg_deploy.images.decoding import BrokenImages, LabelledImages, list_labelled_images, read_batches
from repvgg_deploy.progress import SILENT, Progress, count_steps
from repvgg_deploy.runtime.base import Runner
from repvgg_deploy.runtime.model import Model, rank_classes


@dataclass(frozen=True)
class Evaluation:
    """Top-1 and top-5 in percent; `top5` is None where the model gives fewer than five classes.

    `integers`: `exact` or `native` for a graph whose sums may saturate on this CPU, else None; see `open_model`.
    """

    model: str
    backend: str
    precision: str
    images: int
    top1: float
    top5: float | None
    images_per_sec: float
    broken: dict[str, str]
    integers: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object that `eval --json` prints."""
        return dict(vars(self))


def evaluate(
    model: Model,
    folder: Path,
    batch: int = 64,
    strict: bool = False,
    progress: Progress = SILENT,
) -> Evaluation:
    """The accuracy of `model` on `folder`/<class>/<image>, classes in the sorted order of the folders' names.

    Threads decode while the model runs. Broken images are left out and named in the result.

    Args:
        model: as `open_model` gives it.
        folder: one folder of images a class.
        batch: images a run; a model with a fixed batch has its own.
        strict: a broken image is an error.
        progress: gets the step `evaluating`, in images.

    Raises:
        ImageError: no images, broken ones with `strict`, or nothing but broken ones.
        DeployError: the folders cannot be the model's classes.
    """
    images = list_labelled_images(folder)
    to_class = _map_classes(model, images)
    broken = BrokenImages()
    hits1 = hits5 = count = 0
    width = 5
    advance = count_steps(progress, "evaluating", len(images.paths))
    begin = time.perf_counter()
    for pixels, indices in read_batches(images.paths, model.preprocessing, model.runner.batch or batch, broken):
        if strict and broken.reasons:
            break
        ranked = rank_classes(model.run_pixels(pixels), 5)
        width = ranked.shape[1]
        truth = to_class[[images.labels[i] for i in indices]]
        hits1 += int((ranked[:, 0] == truth).sum())
        hits5 += int((ranked == truth[:, None]).any(axis=1).sum())
        count += len(indices)
        advance(len(indices))
    seconds = time.perf_counter() - begin
    if broken.reasons and (strict or not count):
        raise ImageError(next(iter(broken.reasons.values())), "remove it, or leave --strict out to skip such images")
    return Evaluation(
        model=str(model.path),
        backend=model.runner.backend,
        precision=model.runner.precision,
        images=count,
        top1=round(100 * hits1 / count, 4),
        top5=round(100 * hits5 / count, 4) if width == 5 else None,
        images_per_sec=round(count / seconds, 1),
        broken={str(path): reason for path, reason in broken.reasons.items()},
        integers=_integers(model.runner),
    )


def _integers(runner: Runner) -> str | None:
    if not getattr(runner, "saturating", ()):
        return None
    return "exact" if getattr(runner, "exact_integers", False) else "native"


def _map_classes(model: Model, images: LabelledImages) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The model's class for each folder: by name where the model knows its classes, else by the sorted order."""
    if model.class_names is not None:
        known = _index_names(model.class_names)
        unknown = [name for name in images.class_names if name not in known]
        if not unknown:
            return np.array([known[name] for name in images.class_names])
        if len(unknown) < len(images.class_names):
            raise DeployError(
                f"the folder {unknown[0]} is none of the model's classes, others are",
                "name the folders as the model's classes are, or all of them otherwise, to be taken in sorted order",
            )
    classes = model.classes
    if classes is not None and len(images.class_names) != classes:
        raise DeployError(
            f"the folder has {len(images.class_names)} classes, the model {classes}",
            "give one folder a class, or export with --labels, whose names are then matched with the folders'",
        )
    return np.arange(len(images.class_names))


def _index_names(class_names: tuple[str, ...]) -> dict[str, int]:
    """The index of each class by its name, and by the first word of it where only one class begins with that."""
    # A label file may have more on a line than the folder's name: `n01443537 goldfish`.
    first = [re.split(r"[\t ,]", name)[0] for name in class_names]
    known = {word: i for i, word in enumerate(first) if first.count(word) == 1}
    return known | {name: i for i, name in enumerate(class_names)}
