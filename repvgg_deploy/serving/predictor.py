"""A model as a function from images to predictions: what `predict` runs, and each actor of a cluster."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from repvgg_deploy.artifacts import Array, PreprocessingOptions
from repvgg_deploy.checkpoints import CheckpointOptions
from repvgg_deploy.errors import GraphError, ImageError
from repvgg_deploy.images.decoding import DecodingOptions, ImageData, Pixels
from repvgg_deploy.images.reading import decode_ahead
from repvgg_deploy.runtime.model import Model, open_model, rank_classes, softmax

ImageInput = ImageData | str
"""A file by its path or by its bytes, or pixels (H, W, 3) or (H, W), uint8, of any size."""

NOT_FINITE = "the model gives NaN or Inf for it"


@dataclass(frozen=True)
class PredictOptions:
    """What is predicted, and how.

    Attributes:
        topk: how many classes; fewer where the model has fewer.
        output: `logits` or `features` adds all values of that output of the graph to each prediction.
        batch: images per run; a model with a fixed batch has its own.
        decoding: how image files are decoded.

    Example:
        >>> from repvgg_deploy import PredictOptions, predict
        >>> (first, *_) = predict("net.pth", "images", PredictOptions(topk=2))
        >>> len(first.classes)
        2
    """

    topk: int = 5
    output: Literal["classes", "logits", "features"] = "classes"
    batch: int = 64
    decoding: DecodingOptions = field(default_factory=DecodingOptions)


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or the reason why there is none.

    Attributes:
        path: the image's name; the position of an image that was given as bytes or pixels.
        classes: the best classes, best first.
        names: theirs; None if the model has no names.
        scores: theirs: probabilities, unless a graph with its own top-k outputs something else.
        logits: of all classes, where they were asked for.
        features: the pooled features, where they were asked for.
        error: why there is no prediction; None if there is one.

    Example:
        >>> from repvgg_deploy import predict
        >>> (first, *_) = predict("net.pth", "images")
        >>> first.error is None
        True
    """

    path: str
    classes: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None
    scores: tuple[float, ...] = ()
    logits: tuple[float, ...] | None = None
    features: tuple[float, ...] | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """`path` and `error`, or `path` with everything that is known."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
        optional = {"logits", "features", "error"} | ({"classes", "names", "scores"} if not self.classes else set())
        return {name: value for name, value in values.items() if name not in optional or value}


class Predictor:
    """A model that takes images of any size and gives their classes.

    Example:
        >>> from repvgg_deploy import Predictor
        >>> (first,) = Predictor("net.pth")([np.zeros((64, 64, 3), np.uint8)])
        >>> len(first.scores)
        5
    """

    def __init__(self, model: Model | Path | str, options: PredictOptions | None = None) -> None:
        """Open `model`, unless it is open.

        Raises:
            DeployError: it cannot be opened, or does not give the output that is requested.
        """
        self.model = model if isinstance(model, Model) else open_model(Path(model))
        self.options = options or PredictOptions()

    @property
    def batch(self) -> int:
        """Images per run of the model."""
        return self.model.images_per_run(self.options.batch)

    def __call__(self, images: Sequence[ImageInput]) -> list[Prediction]:
        """A prediction per image, in their order; one that cannot be decoded has an `error`."""
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageInput]) -> Generator[Prediction, None, None]:
        """As a call, for any number of images: threads decode ahead of the model, at most four batches."""
        for_names, for_pixels = itertools.tee(images)
        names = (_name(index, image) for index, image in enumerate(for_names))
        sources = (Path(image) if isinstance(image, str) else image for image in for_pixels)
        with closing(decode_ahead(sources, self.model.preprocessing, 4 * self.batch, self.options.decoding)) as decoded:
            # Broken images count, so that the batches do not depend on which of them are broken.
            for batch in _batched(decoded, self.batch):
                yield from self._predict_batch(list(itertools.islice(names, len(batch))), batch)

    def _predict_batch(self, names: Sequence[str], decoded: Sequence[Pixels | ImageError]) -> Iterator[Prediction]:
        pixels = [image for image in decoded if not isinstance(image, ImageError)]
        rows = iter(self._predict_pixels(np.stack(pixels))) if pixels else iter(())
        for name, image in zip(names, decoded, strict=True):
            if isinstance(image, ImageError):
                yield Prediction(name, error=image.message)
            else:
                yield Prediction(name, **next(rows))

    def _predict_pixels(self, pixels: Pixels) -> list[dict[str, Any]]:
        """The fields of a prediction for each of the cropped images (n, H, W, 3)."""
        outputs = self.model.run_pixels(pixels)
        finite = np.all([np.isfinite(values).all(axis=1) for values in outputs.values()], axis=0)
        if not finite.all():
            # NaN has no rank. The rows of these images are replaced by an error below.
            outputs = {name: np.nan_to_num(values) for name, values in outputs.items()}
        rows: list[dict[str, Any]] = [{} for _ in pixels]
        if self.options.output != "classes":
            for row, values in zip(rows, self._wanted_output(outputs), strict=True):
                row[self.options.output] = _floats(values)
        if set(outputs) != {"features"}:
            for row, found in zip(rows, self._rank(outputs), strict=True):
                row |= found
        return [row if ok else {"error": NOT_FINITE} for row, ok in zip(rows, finite, strict=True)]

    def _wanted_output(self, outputs: dict[str, Array]) -> Array:
        wanted = self.options.output
        if wanted not in outputs:
            raise GraphError(
                f"{self.model.path} gives {' and '.join(outputs)}, not {wanted}",
                "export it with --features" if wanted == "features" else "export it without --softmax and --topk",
            )
        return outputs[wanted]

    def _rank(self, outputs: dict[str, Array]) -> Iterator[dict[str, Any]]:
        ranked = rank_classes(outputs, self.options.topk)
        best = _best_scores(outputs, ranked)
        known = self.model.class_names
        if known is not None and ranked.size and int(ranked.max()) >= len(known):
            raise GraphError(
                f"{self.model.path} names {len(known)} classes, and gives class {int(ranked.max())}", "export it again"
            )
        for classes, scores in zip(ranked.tolist(), best, strict=True):
            names = None if known is None else tuple(known[index] for index in classes)
            yield {"classes": tuple(classes), "names": names, "scores": tuple(float(f"{s:.6g}") for s in scores)}


def _best_scores(outputs: dict[str, Array], ranked: Array) -> Array:
    if "classes" in outputs:
        # A top-k inside the graph has the scores of its own classes only; no softmax can be taken of them.
        return outputs["scores"][:, : ranked.shape[1]]
    name, values = next((n, v) for n, v in outputs.items() if n != "features")
    probabilities = values if name == "probabilities" or _sum_to_one(name, values) else softmax(values)
    return np.take_along_axis(probabilities, ranked, axis=1)


def _sum_to_one(name: str, values: Array) -> bool:
    """Whether an output of another tool's graph, whose name does not say it, holds probabilities."""
    return name != "logits" and bool((values >= 0).all() and (np.abs(values.sum(axis=1) - 1) < 1e-3).all())


def _floats(values: Array) -> tuple[float, ...]:
    """With the digits that a float32 has."""
    return tuple(float(f"{value:.9g}") for value in values.tolist())


def _name(index: int, image: ImageInput) -> str:
    return str(index) if isinstance(image, bytes | np.ndarray) else str(image)


def _batched(items: Iterable[Pixels | ImageError], size: int) -> Iterator[list[Pixels | ImageError]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@dataclass(frozen=True)
class PredictorSpec:
    """What opens a `Predictor`, here or in another process: a model's file, how it is opened, what is predicted."""

    model: Path
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    trust: bool = False
    exact_integers: bool = True
    threads: int = 0
    options: PredictOptions = field(default_factory=PredictOptions)

    def open(self) -> Predictor:
        """The predictor.

        Raises:
            DeployError: as `open_model`.
        """
        how = (self.preprocessing, self.checkpoint, self.trust, self.exact_integers, self.threads)
        model = open_model(self.model, *how)
        return Predictor(model, self.options)

    def identity(self, predictor: Predictor) -> dict[str, Any]:
        """What decides the predictions, besides the model's bytes and the images; JSON can hold it."""
        options = asdict(self.options)
        del options["decoding"]
        return {
            **options,
            "batch": predictor.batch,
            "decoder": self.options.decoding.library,
            "max_bytes": self.options.decoding.max_bytes,
            "preprocessing": predictor.model.preprocessing.to_json(),
            "backend": predictor.model.runner.backend,
            "checkpoint": asdict(self.checkpoint),
        }
