"""Two models side by side: how far their outputs differ on the same images, and whether that is too much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from repvgg_deploy.artifacts import Array, Parity, PreprocessingOptions
from repvgg_deploy.checkpoints import CheckpointOptions
from repvgg_deploy.errors import (
    DeployError,
    GraphError,
    ImageError,
    LimitCheck,
    ThresholdError,
    VerificationError,
    first_failure,
)
from repvgg_deploy.files.kinds import file_kind
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.images.sources import list_images
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.runtime.model import Model, open_model, softmax
from repvgg_deploy.verification.inputs import choose_pixels
from repvgg_deploy.verification.parity import MAX_RELATIVE, compare_outputs, require_parity


@dataclass(frozen=True)
class Tolerance:
    """What two models may differ by; None for the largest relative difference is decided by their precision."""

    max_relative: float | None = None
    max_abs: float | None = None
    max_disagreement: float | None = None

    def check(self, parity: Parity, precisions: set[str]) -> tuple[LimitCheck, ...]:
        """`parity` of two models of these precisions beside each limit.

        The failure of a limit that the user set is a `ThresholdError`, that of the default one, which their precisions
        decide, a `VerificationError`. A figure that is not a number meets no limit.
        """
        checks = [self._check_relative(parity, precisions)]
        if self.max_abs is not None:
            words = f"a logit differs by {parity.max_abs:.3g}, more than {self.max_abs:g}"
            checks.append(_at_most("largest difference of a logit, --max-abs", parity.max_abs, self.max_abs, words))
        disagreement = 100 - parity.top1_agreement
        if (most := self.max_disagreement) is not None:
            words = f"the top-1 class of {disagreement:.2f} % of the images differs, more than {most:g} %"
            checks.append(_at_most("other top-1 classes in percent, --max-disagreement", disagreement, most, words))
        return tuple(checks)

    def _check_relative(self, parity: Parity, precisions: set[str]) -> LimitCheck:
        if self.max_relative is not None:
            words = f"the outputs differ by {parity.relative:.3g} relative, more than {self.max_relative:g}"
            return _at_most("relative difference, --max-relative", parity.relative, self.max_relative, words)
        # A graph of unknown origin must agree as float32 does; the user can give a looser tolerance.
        allowed = MAX_RELATIVE["models"]
        coarsest = max(allowed.get(precision, allowed["fp32"]) for precision in precisions)
        name, failure = f"relative difference, by default for {' and '.join(sorted(precisions))}", None
        try:
            require_parity("verify", parity, coarsest)
        except VerificationError as error:
            failure = error
        return LimitCheck(name, parity.relative, coarsest, failure)

    def require(self, parity: Parity, precisions: set[str]) -> None:
        """Raise the first failure that `check` finds.

        Raises:
            ThresholdError: a limit that the user set is exceeded, or a figure is not a number.
            VerificationError: the default limit for their precisions is.
        """
        failure = first_failure(self.check(parity, precisions))
        if failure is not None:
            raise failure


def _at_most(name: str, value: float, limit: float, words: str) -> LimitCheck:
    return LimitCheck(name, value, limit, None if value <= limit else ThresholdError(words, _LOOK))


_LOOK = "check with `inspect` that both come from the same checkpoint and use the same preprocessing"


@dataclass(frozen=True)
class VerifyOptions:
    """How two models are compared.

    Attributes:
        tolerance: what they may differ by.
        data: the folder of images that they are run on; by default a few synthetic ones.
        count: the most images of it.
        preprocessing: what the user said of it; by default it comes from the metadata of an exported graph, else from
            the card of a checkpoint.
        checkpoint: how a checkpoint is read. What it leaves open of the strides and the activation is taken from the
            metadata of the graph beside it.
        trust, exact_integers: see `open_model`.
    """

    tolerance: Tolerance = field(default_factory=Tolerance)
    data: Path | None = None
    count: int | None = None
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    trust: bool = False
    exact_integers: bool = True


def verify_models(
    first: Path, second: Path, options: VerifyOptions | None = None, progress: Progress = SILENT
) -> Parity:
    """How the outputs of model `second` differ from those of `first`, both run on the same pixels.

    Raises:
        VerificationError, ThresholdError: they differ by more than the tolerance; see `Tolerance.require`.
        DeployError: a model cannot be opened, or they do not take the same pixels.

    Example:
        >>> from repvgg_deploy import verify_models
        >>> parity = verify_models(Path("net.pth"), Path("deploy.pth"))
        >>> parity.relative < 1e-4
        True
    """
    parity, checks = compare_models(first, second, options, progress)
    failure = first_failure(checks)
    if failure is not None:
        raise failure
    return parity


def compare_models(
    first: Path, second: Path, options: VerifyOptions | None = None, progress: Progress = SILENT
) -> tuple[Parity, tuple[LimitCheck, ...]]:
    """As `verify_models`, but what exceeds the tolerance is returned beside the differences, not raised.

    Raises:
        DeployError: a model cannot be opened, or they do not take the same pixels.
    """
    options = options or VerifyOptions()
    a, b = _open_both(first, second, options, progress)
    if a.preprocessing != b.preprocessing:
        raise DeployError(
            f"the models take different pixels: {a.preprocessing.to_json()} and {b.preprocessing.to_json()}",
            "give the preprocessing options that fit both",
        )
    pixels = None if options.data is not None else choose_pixels(a.preprocessing, _channels(a, b), 16)
    parity = _compare_outputs(a, b, options.data, pixels, options.count)
    return parity, options.tolerance.check(parity, {a.runner.precision, b.runner.precision})


def _open_both(first: Path, second: Path, options: VerifyOptions, progress: Progress) -> tuple[Model, Model]:
    """Both models; a checkpoint beside a graph is opened second, with what the graph records."""
    graphs = [file_kind(path) != "checkpoint" for path in (first, second)]
    models: list[Model] = []
    said = options.checkpoint
    for path in sorted((first, second), key=lambda path: file_kind(path) == "checkpoint"):
        shared, how = options.preprocessing, said
        if graphs.count(True) == 1:
            if models:
                shared = PreprocessingOptions.same_as(models[0].preprocessing)
                how = replace(said, structure=said.structure.over(models[0].structure))
            else:
                how = CheckpointOptions(said.arch)
        models.append(open_model(path, shared, how, options.trust, options.exact_integers))
        for note in models[-1].notes:
            progress.note(f"note: {note}")
    if models[0].path != first:
        models.reverse()
    return models[0], models[1]


def _channels(*models: Model) -> int:
    return next((model.channels for model in models if model.channels is not None), 3)


def _compare_outputs(first: Model, second: Model, data: Path | None, pixels: Array | None, count: int | None) -> Parity:
    broken = BrokenImages()
    if pixels is None:
        paths = list_images(data or Path())[:count]
        batches: Iterable[Array] = (found for found, _ in read_batches(paths, first.preprocessing, 16, broken))
    else:
        batches = [pixels]
    outputs = [(_all_outputs(first, found), _all_outputs(second, found)) for found in batches]
    if broken.reasons:
        raise ImageError(next(iter(broken.reasons.values())), "remove it, or give another folder")
    a, b = (
        {name: np.concatenate([pair[side][name] for pair in outputs]) for name in outputs[0][side]} for side in (0, 1)
    )
    # Where one model gives probabilities, those of the other's logits are computed.
    for one, other in ((a, b), (b, a)):
        if "probabilities" in one and "logits" in other:
            other["probabilities"] = softmax(other.pop("logits"))
    return compare_outputs(a, b)


def _all_outputs(model: Model, pixels: Array) -> dict[str, Array]:
    """The outputs by name; the scores of a graph of unknown origin are logits."""
    outputs = model.run_pixels(pixels)
    if "classes" in outputs:
        raise GraphError(f"{model.path} gives only its best classes", "export without --topk to compare all scores")
    if model.classes == 0 or "probabilities" in outputs:
        return outputs
    return {"logits": next(iter(outputs.values()))}
