"""How far two sets of logits are from each other, and what is too far."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.artifacts import Parity
from repvgg_deploy.errors import VerificationError

# Largest relative differences of the outputs, by what is compared and in which precision. Float32 arithmetic alone
# costs 1e-6 to 1e-5 on nets of this depth. FP16 and TF32 have a rounding of 5e-4, accumulated over the layers. Between
# two runs of one INT8 graph a value on the border between two steps may fall to either side in every layer.
MAX_RELATIVE = {
    # A stage of an export and the one before.
    "stage": {"fp32": 1e-4, "fp16": 3e-2, "int8": 1e-1},
    # An engine and its graph in ONNX Runtime; a GPU sums in an order of its own.
    "engine": {"fp32": 1e-3, "tf32": 1e-2, "fp16": 3e-2, "int8": 1e-1, "unknown": 1e-1},
    # Any two models. INT8 is not a copy of the net: what it may cost is a matter of accuracy, not of equality.
    "models": {"fp64": 1e-4, "fp32": 1e-4, "tf32": 1e-2, "fp16": 3e-2, "int8": 0.5},
}


def compare(reference: NDArray[np.floating], candidate: NDArray[np.floating]) -> Parity:
    """The differences of `candidate` from `reference`, both (images, …), computed in float64.

    Raises:
        VerificationError: the shapes differ, or one of them contains NaN or Inf.
    """
    if reference.shape != candidate.shape:
        raise VerificationError(
            f"the outputs have different shapes: {reference.shape} and {candidate.shape}",
            "the models do not have the same classes, or not the same outputs",
        )
    a, b = (array.astype(np.float64).reshape(len(array), -1) for array in (reference, candidate))
    for array, which in ((a, "first"), (b, "second")):
        if not np.isfinite(array).all():
            raise VerificationError(f"the {which} model's outputs contain NaN or Inf", "in FP16: values beyond 65504")
    difference = b - a
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    cosine = (a * b).sum(1) / np.maximum(norms[0] * norms[1], np.finfo(np.float64).tiny)
    return Parity(
        max_abs=float(np.abs(difference).max(initial=0.0)),
        relative=float(np.linalg.norm(difference) / max(float(np.linalg.norm(a)), np.finfo(np.float64).tiny)),
        cosine=float(np.where(both_zero, 1.0, cosine).min(initial=1.0)),
        top1_agreement=100 * float((a.argmax(1) == b.argmax(1)).mean()) if len(a) else 100.0,
        images=len(a),
    )


def compare_outputs(
    reference: Mapping[str, NDArray[np.floating]], candidate: Mapping[str, NDArray[np.floating]]
) -> Parity:
    """The worst differences over all outputs of two models, of any shapes (images, …), by their names.

    For outputs that are not scores, `top1_agreement` is the share of images with the same largest value.

    Raises:
        VerificationError: the outputs have other names or shapes, or contain NaN or Inf.
    """
    if reference.keys() != candidate.keys():
        raise VerificationError(
            f"the models give {', '.join(reference)} and {', '.join(candidate)}", "compare models with the same outputs"
        )
    found = [compare(reference[name], candidate[name]) for name in reference]
    return Parity(
        max_abs=max(parity.max_abs for parity in found),
        relative=max(parity.relative for parity in found),
        cosine=min(parity.cosine for parity in found),
        top1_agreement=min(parity.top1_agreement for parity in found),
        images=found[0].images,
    )


def require_parity(stage: str, parity: Parity, max_relative: float) -> None:
    """Raise VerificationError if the relative difference in `parity` exceeds `max_relative`.

    Raises:
        VerificationError: the relative difference is larger than that, or NaN.
    """
    if not parity.relative <= max_relative:
        raise VerificationError(
            f"{stage}: the outputs differ by {parity.relative:.2e} relative, more than the {max_relative:.0e} allowed",
            f"largest difference {parity.max_abs:.3g}, top-1 agreement {parity.top1_agreement:.1f} % "
            f"on {parity.images} images; nothing was written",
        )
