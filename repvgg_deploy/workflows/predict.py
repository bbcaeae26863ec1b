"""Predictions for any number of images: as an iterator, or into a file that an interrupted run continues."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from repvgg_deploy.errors import ImageError, VerificationError
from repvgg_deploy.files.abort import undone_on_abort
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.images.sources import ImageSource, find_images, list_lines
from repvgg_deploy.progress import SILENT, Progress, count_steps
from repvgg_deploy.runtime.model import Model
from repvgg_deploy.serving import Prediction, PredictOptions, Predictor, PredictorSpec
from repvgg_deploy.serving.predictor import NOT_FINITE, ImageInput
from repvgg_deploy.workflows.prediction_files import (
    Journal,
    check_format,
    count_errors,
    encode_row,
    write_predictions,
)


def predict(
    model: Model | Path | str, images: Path | str | Iterable[ImageInput], options: PredictOptions | None = None
) -> Iterator[Prediction]:
    """The predictions of a model for images, in their order, one at a time; a broken image has an `error`.

    Args:
        model: a checkpoint, an ONNX graph or an engine, or what `open_model` gave.
        images: a folder, pattern, list, tar archive or image file; or an iterable of image files, of their bytes, or
            of pixels (H, W, 3) uint8.
        options: how many classes, which outputs, the batch, and how files are decoded.

    Raises:
        DeployError: the model cannot be opened, or there is no image.

    Example:
        >>> from repvgg_deploy import predict
        >>> for prediction in predict("net.pth", "images"):
        ...     print(len(prediction.classes))
        ...     break
        5
    """
    found: Iterable[ImageInput] = find_images([images]) if isinstance(images, Path | str) else images
    return Predictor(model, options).stream(found)


@dataclass(frozen=True)
class PredictRequest:
    """What `predict` writes.

    Attributes:
        spec: the model, and what is predicted.
        images: folders, patterns, lists, archives and files; `-` takes paths from standard input, one per line.
        output: a `.jsonl`, `.csv` or `.parquet` file.
        resume: continue an interrupted run of the same model and options.
        strict: the first image that cannot be read is an error.
    """

    spec: PredictorSpec
    images: tuple[str, ...]
    output: Path
    resume: bool = False
    strict: bool = False


@dataclass(frozen=True)
class PredictSummary:
    """What was predicted: `images` rows, `broken` of them with an error, `resumed` of them from an earlier run."""

    model: str
    file: str
    backend: str
    precision: str
    images: int
    broken: int
    resumed: int
    images_per_sec: float | None
    decoder: str

    def to_dict(self) -> dict[str, Any]:
        """The object that `predict --json` prints."""
        return asdict(self)


def predict_to_file(request: PredictRequest, progress: Progress = SILENT) -> PredictSummary:
    """Write a row per image to `request.output`, in the order of the images, each name once.

    The rows go to a journal beside the output, `FILE.partial`, batch by batch; the output appears when all are there,
    and is the same whether or not the run was interrupted. Whoever kills the process finds the old output or the new
    one, and a journal to continue from.

    Raises:
        ImageError: there is no image, or a broken one with `strict`.
        VerificationError: the model outputs only NaN or Inf.
        DeployError: the model cannot be opened, the output cannot be written, or the journal belongs to another run.
    """
    check_format(request.output)
    predictor = request.spec.open()
    for note in predictor.model.notes:
        progress.note(f"note: {note}")
    images = find_sources(request.images)
    names = [str(image) for image in images]
    partial = request.output.with_name(f"{request.output.name}.partial")
    if request.resume and not partial.exists() and (errors := count_errors(request.output, names)) is not None:
        progress.note(f"note: {request.output} already has all {len(names):,} images")
        return _summarize(request, predictor, len(names), errors, len(names), None)
    identity = {"model": hash_file(request.spec.model), **request.spec.identity(predictor)}
    journal = Journal(request.output, identity, request.resume)
    before = sum(name in journal for name in names)
    try:
        start = time.perf_counter()
        with undone_on_abort(journal.leave):
            for rows in _run_missing(predictor, images, journal, progress):
                _check_rows(rows, request.strict)
                journal.append(row.to_dict() for row in rows)
        seconds = time.perf_counter() - start
        broken = _require_answers(journal.lines(names), predictor)
        write_predictions(request.output, lambda: journal.lines(names))
    except BaseException:
        if (words := journal.leave()) is not None:
            progress.note(words)
        raise
    journal.remove()
    return _summarize(request, predictor, len(names), broken, before, seconds)


def find_sources(images: Sequence[str]) -> tuple[ImageSource, ...]:
    """The images of `images`, in their order, each name once; `-` are the paths on standard input.

    Raises:
        ImageError: one of them has no image.
    """
    found: dict[str, ImageSource] = {}
    for source in images:
        listed = list_lines(_standard_input(), Path()) if source == "-" else find_images([source])
        found.update((str(image), image) for image in listed if str(image) not in found)
    if not found:
        raise ImageError("there is no image on standard input", "give one path per line")
    return tuple(found.values())


def _standard_input() -> Iterator[str]:
    """The lines of standard input; a name that is not UTF-8 becomes what the names of such files are in Python.

    Raises:
        ImageError: it is closed, or cannot be read.
    """
    if sys.stdin is None:
        raise ImageError("there is no standard input", "give one path per line")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        yield from sys.stdin
    except OSError as error:
        raise ImageError(f"cannot read standard input: {error.strerror}", "give one path per line") from error


def _run_missing(
    predictor: Predictor, images: Sequence[ImageSource], journal: Journal, progress: Progress
) -> Iterator[list[Prediction]]:
    """The predictions of each batch that has an image without a row.

    Batches are cut at the same places in every run, since the last bits of scores may depend on a batch's size.
    """
    size = predictor.batch
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    missing = [batch for batch in batches if not all(str(image) in journal for image in batch)]
    advance = count_steps(progress, "predicting", len(images))
    advance(len(images) - sum(map(len, missing)))
    with closing(predictor.stream(image for batch in missing for image in batch)) as stream:
        for batch in missing:
            yield list(islice(stream, len(batch)))
            advance(len(batch))


def _check_rows(rows: Iterable[Prediction], strict: bool) -> None:
    broken = next((row for row in rows if row.error is not None), None)
    if strict and broken is not None:
        error = str(broken.error)
        raise ImageError(
            error if broken.path in error else f"{broken.path}: {error}",
            "remove it, or leave --strict out to have its error in its row",
        )


def _require_answers(lines: Iterable[bytes], predictor: Predictor) -> int:
    """The number of rows with an error.

    Raises:
        VerificationError: the model output only NaN or Inf for the images that could be read.
    """
    broken = not_finite = total = 0
    for line in lines:
        total += 1
        # Cheaper than parsing every row: no other row has this key.
        if b'", "error": "' in line:
            broken += 1
            not_finite += b'"error": "%s"' % NOT_FINITE.encode() in line
    if not_finite and broken == total:
        raise VerificationError(
            f"{predictor.model.path} gives NaN or Inf for every image",
            "in FP16: values beyond 65504; compare it with its checkpoint: `verify`",
        )
    return broken


def print_predictions(request: PredictRequest, write: Callable[[str], object], progress: Progress = SILENT) -> int:
    """Give each prediction to `write` as a line of JSON, as soon as it is made; returns how many have an error.

    Raises:
        DeployError: as `predict_to_file`, less what is about files.
    """
    predictor = request.spec.open()
    for note in predictor.model.notes:
        progress.note(f"note: {note}")
    broken = 0
    with closing(predictor.stream(find_sources(request.images))) as stream:
        for row in stream:
            _check_rows([row], request.strict)
            broken += row.error is not None
            write(encode_row(row.to_dict()).decode())
    return broken


def _summarize(
    request: PredictRequest, predictor: Predictor, images: int, broken: int, resumed: int, seconds: float | None
) -> PredictSummary:
    runner = predictor.model.runner
    return PredictSummary(
        model=str(request.spec.model),
        file=str(request.output),
        backend=runner.backend,
        precision=runner.precision,
        images=images,
        broken=broken,
        resumed=resumed,
        images_per_sec=round((images - resumed) / seconds, 1) if seconds and images > resumed else None,
        decoder=request.spec.options.decoding.library,
    )
