"""Accuracy of a model on labelled images, and the agreement of two models on any."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.artifacts import Array, Parity
from repvgg_deploy.errors import DeployError, GraphError, ImageError, VerificationError
from repvgg_deploy.images.decoding import BrokenImages, LabelledImages, list_images, list_labelled_images, read_batches
from repvgg_deploy.runtime.base import Runner
from repvgg_deploy.runtime.model import Model, PreprocessingOptions, is_engine, is_onnx, open_model, rank_classes
from repvgg_deploy.verification.inputs import choose_pixels
from repvgg_deploy.verification.parity import compare, require_parity

Advance = Callable[[int], None]


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
    start: Callable[[int], Advance] = lambda _: lambda _: None,
) -> Evaluation:
    """The accuracy of `model` on `folder`/<class>/<image>, classes in the sorted order of the folders' names.

    Threads decode while the model runs. Broken images are left out and named in the result.

    Args:
        model: as `open_model` gives it.
        folder: one folder of images a class.
        batch: images a run; a model with a fixed batch has its own.
        strict: a broken image is an error.
        start: called with the number of images; what it returns is called with the number done since.

    Raises:
        ImageError: no images, broken ones with `strict`, or nothing but broken ones.
        DeployError: the folders cannot be the model's classes.
    """
    images = list_labelled_images(folder)
    to_class = _map_classes(model, images)
    broken = BrokenImages()
    hits1 = hits5 = count = 0
    width = 5
    advance = start(len(images.paths))
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


@dataclass(frozen=True)
class Tolerance:
    """What two models may differ by; None for the largest relative difference is decided by their precision."""

    max_relative: float | None = None
    max_abs: float | None = None
    max_disagreement: float | None = None

    def require(self, parity: Parity, precisions: set[str]) -> None:
        """Nothing, where `parity` is within the tolerance.

        Raises:
            VerificationError: a difference is larger, or a number is none.
        """
        # A graph of unknown origin is held to float32: a looser tolerance is the user's to give.
        coarsest = max(_MAX_RELATIVE.get(precision, _MAX_RELATIVE["fp32"]) for precision in precisions)
        require_parity("verify", parity, coarsest if self.max_relative is None else self.max_relative)
        if self.max_abs is not None and not parity.max_abs <= self.max_abs:
            raise VerificationError(f"a logit differs by {parity.max_abs:.3g}, more than {self.max_abs:g}", _LOOK)
        disagreement = 100 * (1 - parity.top1_agreement)
        if self.max_disagreement is not None and not disagreement <= self.max_disagreement:
            raise VerificationError(
                f"the top-1 class of {disagreement:.2f} % of the images differs, more than {self.max_disagreement:g} %",
                _LOOK,
            )


_LOOK = "see with `inspect` whether both are of one checkpoint, and take the same preprocessing"

# Float32 arithmetic alone costs 1e-6 to 1e-5 on nets of this depth; FP16 has a rounding of 5e-4, accumulated over the
# layers. INT8 is no copy of the net: what it may cost is a matter of accuracy, not of equality.
_MAX_RELATIVE = {"fp64": 1e-4, "fp32": 1e-4, "tf32": 1e-2, "fp16": 3e-2, "int8": 0.5}


def verify_models(
    first: Path,
    second: Path,
    options: PreprocessingOptions,
    tolerance: Tolerance,
    data: Path | None = None,
    count: int | None = None,
    arch: str | None = None,
    ema: bool | None = None,
    trust: bool = False,
    exact_integers: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Parity:
    """How the outputs of model `second` differ from those of `first`, on the images of `data` or on drawn ones.

    Both get the same pixels: prepared as the user says, else as the metadata of an exported graph say, else as the
    card of a checkpoint does.

    Raises:
        VerificationError: they differ by more than `tolerance`.
        DeployError: a model cannot be opened, or they do not take the same pixels.
    """
    graphs = [is_onnx(path) or is_engine(path) for path in (first, second)]
    models: list[Model] = []
    for path in sorted((first, second), key=lambda path: not (is_onnx(path) or is_engine(path))):
        shared = options
        if models and graphs.count(True) == 1:
            known = models[0].preprocessing
            shared = PreprocessingOptions((known.height, known.width), known.resize, known.mean, known.std)
        models.append(open_model(path, shared, arch, ema, trust, exact_integers))
        for note in models[-1].notes:
            say(f"note: {note}")
    if models[0].path != first:
        models.reverse()
    a, b = models
    if a.preprocessing != b.preprocessing:
        raise DeployError(
            f"the models take different pixels: {a.preprocessing.to_json()} and {b.preprocessing.to_json()}",
            "give --size, --resize, --mean and --std that fit both",
        )
    pixels = None if data is not None else choose_pixels(a.preprocessing, _channels(a, b), 8)
    parity = _compare_outputs(a, b, data, pixels, count)
    tolerance.require(parity, {a.runner.precision, b.runner.precision})
    return parity


def _channels(*models: Model) -> int:
    return next((model.channels for model in models if model.channels is not None), 3)


def _compare_outputs(first: Model, second: Model, data: Path | None, pixels: Array | None, count: int | None) -> Parity:
    broken = BrokenImages()
    if pixels is None:
        paths = list_images(data or Path())[:count]
        batches: Iterable[Array] = (found for found, _ in read_batches(paths, first.preprocessing, 16, broken))
    else:
        batches = [pixels]
    outputs = [(_scores(first, found), _scores(second, found)) for found in batches]
    if broken.reasons:
        raise ImageError(next(iter(broken.reasons.values())), "remove it, or give another folder")
    kinds = {pair[i][0] for pair in outputs for i in (0, 1)}
    # Where one model gives probabilities, those of the other's logits are computed.
    first_scores, second_scores = (
        np.concatenate([softmax(v) if len(kinds) > 1 and kind == "logits" else v for kind, v in side])
        for side in ([pair[0] for pair in outputs], [pair[1] for pair in outputs])
    )
    return compare(first_scores, second_scores)


def _scores(model: Model, pixels: Array) -> tuple[str, Array]:
    outputs = model.run_pixels(pixels)
    if "classes" in outputs:
        raise GraphError(f"{model.path} gives only its best classes", "export without --topk to compare all scores")
    name, values = next(iter(outputs.items()))
    return ("probabilities" if name == "probabilities" else "logits"), values


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
