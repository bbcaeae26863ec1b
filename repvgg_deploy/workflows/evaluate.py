"""Accuracy of a model on labelled images."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.artifacts import Array
from repvgg_deploy.errors import DeployError, ImageError, VerificationError
from repvgg_deploy.images.decoding import DecodingOptions
from repvgg_deploy.images.labelled import LabelledImages, list_labelled_images
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.progress import SILENT, Progress, count_steps
from repvgg_deploy.runtime.base import Runner
from repvgg_deploy.runtime.model import Model, rank_classes

# Without the model's own number of classes, one beyond all that there are is a damaged ground truth.
_MOST_CLASSES = 1 << 24


@dataclass(frozen=True)
class Evaluation:
    """Top-1 and top-5 in percent; `top5` is None if the model gives fewer than five classes.

    `integers`: `exact` or `native` for a graph whose sums may saturate on this CPU, else None; see `open_model`.
    `decoder`: what decoded JPEG files, `pillow` or `simplejpeg`. `notes`: what a user should know of the result.
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
    decoder: str = "pillow"
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The object that `eval --json` prints."""
        return dict(vars(self))


@dataclass(frozen=True)
class EvaluationOptions:
    """The ground-truth file of images that lie in no class folders, and how images are decoded."""

    ground_truth: Path | None = None
    decoding: DecodingOptions | None = None


def evaluate(
    model: Model,
    folder: Path,
    batch: int = 64,
    strict: bool = False,
    progress: Progress = SILENT,
    options: EvaluationOptions | None = None,
) -> Evaluation:
    """The accuracy of `model` on labelled images, in any layout of `list_labelled_images`.

    Threads decode while the model runs. Broken images, folders and archives are left out and named in the result. An
    accuracy that guessing gives as well is reported as a warning, with its usual reasons.

    Args:
        model: as `open_model` gives it.
        folder: one folder of images per class, sorted by name, or tar archives.
        batch: images per run; a model with a fixed batch has its own.
        strict: a broken image is an error.
        progress: receives the step `evaluating`, in images.
        options: the ground truth of a flat folder, and how images are decoded.

    Raises:
        ImageError: no images, broken ones with `strict`, or nothing but broken ones.
        VerificationError: the scores are NaN or infinite, or do not depend on the image.
        DeployError: the folders cannot be the model's classes.

    Example:
        >>> from repvgg_deploy import evaluate, open_model
        >>> result = evaluate(open_model(Path("net.pth")), Path("images"))
        >>> result.images
        36
    """
    model.require_classes()
    options = options or EvaluationOptions()
    images = list_labelled_images(folder, options.ground_truth)
    to_class = map_classes(images, model.class_names, model.classes)
    advance = count_steps(progress, "evaluating", len(images.paths))
    broken = BrokenImages({entry: f"{entry} cannot be read ({entry.reason})" for entry in images.unreadable})
    size = model.images_per_run(batch)
    hits, scores = Hits(), ScoreCheck(str(model.path))
    begin = time.perf_counter()
    for pixels, indices in read_batches(images.paths, model.preprocessing, size, broken, options.decoding):
        if strict and broken.reasons:
            break
        outputs = model.run_pixels(pixels)
        scores = scores.add(pixels, outputs)
        hits = hits.add(rank_classes(outputs, 5), to_class[[images.labels[i] for i in indices]])
        advance(len(indices))
    seconds = time.perf_counter() - begin
    if broken.reasons and (strict or not hits.count):
        raise ImageError(next(iter(broken.reasons.values())), "remove it, or leave --strict out to skip such images")
    scores.require_dependence()
    classes = len(images.class_names) if images.class_names is not None else model.classes
    notes = (_CHANCE,) if hits.is_chance(classes or 1) else ()
    for note in notes:
        progress.note(f"warning: {note}")
    return Evaluation(
        model=str(model.path),
        backend=model.runner.backend,
        precision=model.runner.precision,
        images=hits.count,
        top1=hits.top1,
        top5=hits.top5,
        images_per_sec=round(hits.count / seconds, 1),
        broken={str(path): reason for path, reason in broken.reasons.items()},
        integers=_integers(model.runner),
        decoder=(options.decoding or DecodingOptions()).library,
        notes=notes,
    )


_CHANCE = (
    "top-1 is what guessing gives. The usual reasons: another input size, mean, std or colour order than in training"
    " (--size, --mean, --std, --color-order), classes in another order (--labels at the export), or strides, an"
    " activation or a BN epsilon that the checkpoint does not state (--strides, --act, --bn-eps); `inspect` shows them"
)


@dataclass(frozen=True)
class Hits:
    """How often the right class was the best, and among the five best; `width` is how many classes were ranked."""

    count: int = 0
    first: int = 0
    among_five: int = 0
    width: int = 5

    def add(self, ranked: NDArray[np.int64], truth: NDArray[np.int64]) -> Hits:
        """With a batch of classes, best first (n, k), and the right ones (n)."""
        return Hits(
            self.count + len(truth),
            self.first + int((ranked[:, 0] == truth).sum()),
            self.among_five + int((ranked == truth[:, None]).any(axis=1).sum()),
            min(self.width, ranked.shape[1]),
        )

    def is_chance(self, classes: int) -> bool:
        """Whether as many are right as guessing gets, within two standard deviations; False if too few were seen."""
        share = 1 / classes
        limit = self.count * share + 2 * math.sqrt(self.count * share * (1 - share))
        # Of few images two deviations reach past the middle between guessing and all right: they show nothing.
        return self.first <= limit < self.count * (1 + share) / 2

    @property
    def top1(self) -> float:
        """In percent."""
        return round(100 * self.first / self.count, 4)

    @property
    def top5(self) -> float | None:
        """In percent; None below five classes."""
        return round(100 * self.among_five / self.count, 4) if self.width == 5 else None


@dataclass(frozen=True)
class ScoreCheck:
    """Whether a model's scores can be those of a classifier: finite, and not the same whatever the image is.

    Without it the accuracy of a graph that gives nothing but NaN would be that of its first class.
    """

    model: str
    first: tuple[NDArray[np.uint8], dict[str, Array]] | None = None
    pixels_differ: bool = False
    scores_differ: bool = False

    def add(self, pixels: NDArray[np.uint8], outputs: dict[str, Array]) -> ScoreCheck:
        """With a batch; compared with the very first image.

        Raises:
            VerificationError: a score is NaN or infinite.
        """
        if not all(np.isfinite(values).all() for values in outputs.values()):
            raise VerificationError(
                f"{self.model} gives NaN or Inf in place of scores",
                "in FP16: values beyond 65504; compare it with its checkpoint: `verify`",
            )
        first_pixels, first = self.first or (pixels[0], {name: values[0] for name, values in outputs.items()})
        differ = any((values != first[name]).any() for name, values in outputs.items()) and _rank(outputs)
        return ScoreCheck(
            self.model,
            (first_pixels, first),
            self.pixels_differ or bool((pixels != first_pixels).any()),
            self.scores_differ or differ,
        )

    def require_dependence(self) -> None:
        """Raise VerificationError if different images all had the same scores, or all classes the same one."""
        if self.pixels_differ and not self.scores_differ:
            raise VerificationError(
                f"the scores that {self.model} gives do not depend on the image",
                "its weights or its graph are damaged; compare it with its checkpoint: `verify`",
            )


def _rank(outputs: dict[str, Array]) -> bool:
    """Whether scores tell one class from another, for any image; a single score cannot."""
    scores = next(iter(outputs.values()))
    return scores.shape[1] == 1 or bool((scores.max(axis=1) > scores.min(axis=1)).any())


def _integers(runner: Runner) -> str | None:
    if not getattr(runner, "saturating", ()):
        return None
    return "exact" if getattr(runner, "exact_integers", False) else "native"


def map_classes(images: LabelledImages, class_names: tuple[str, ...] | None, classes: int | None) -> NDArray[np.int64]:
    """The model's class for each label: by name where the model knows its classes, else by the sorted order.

    Raises:
        DeployError: the labels cannot be the model's classes.
    """
    names = images.class_names
    if names is None:
        # The ground truth has the model's own numbers.
        highest = max(images.labels)
        if classes is None and highest >= _MOST_CLASSES:
            raise DeployError(f"the ground truth has class {highest}", "number the classes from 0")
        if classes is not None and highest >= classes:
            raise DeployError(
                f"the ground truth has class {highest}, but the model's classes are 0 to {classes - 1}",
                "number the classes from 0, in the order of the model's outputs",
            )
        return np.arange(highest + 1)
    if class_names is not None:
        known = _index_names(class_names)
        unknown = [name for name in names if name not in known]
        if not unknown:
            return np.array([known[name] for name in names])
        if len(unknown) < len(names):
            raise DeployError(
                f"the folder {unknown[0]} is not one of the model's classes, and others are",
                "name all folders after the model's classes, or none of them, which are then taken in sorted order",
            )
    if classes is not None and len(names) != classes:
        raise DeployError(
            f"the folder has {len(names)} classes, but the model has {classes}",
            "give one folder per class, or export with --labels, whose names are then matched with the folders'",
        )
    return np.arange(len(names))


def _index_names(class_names: tuple[str, ...]) -> dict[str, int]:
    """The index of each class by its name, and by the first word of it where only one class begins with that."""
    # A label file may have more on a line than the folder's name: `n01443537 goldfish`.
    first = [re.split(r"[\t ,]", name)[0] for name in class_names]
    known = {word: i for i, word in enumerate(first) if first.count(word) == 1}
    return known | {name: i for i, name in enumerate(class_names)}
