"""The outputs of a whole network, each compared by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from repvgg_deploy.artifacts import Array, Parity
from repvgg_deploy.verification.parity import compare, require_parity


def compare_each(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> dict[str, Parity]:
    """How each output of `candidate` differs from that of `reference`.

    Outputs with more than two dimensions (N, classes, …) agree where the largest of their classes is the same, place by
    place: for a segmentation net that is the share of equal pixels.

    Raises:
        VerificationError: shapes differ, or a value is NaN or Inf.
    """
    return {name: _compare(values, candidate[name]) for name, values in reference.items()}


def _compare(reference: Array, candidate: Array) -> Parity:
    a, b = (np.atleast_2d(values.astype(np.float64)) for values in (reference, candidate))
    parity = compare(a, b)
    if a.ndim > 2 and a.size:
        parity = replace(parity, top1_agreement=100 * float((a.argmax(1) == b.argmax(1)).mean()))
    return parity


def require_all(stage: str, parities: Mapping[str, Parity], max_relative: float) -> None:
    """Raise VerificationError if one of the outputs differs by more than `max_relative`."""
    for name, parity in parities.items():
        require_parity(f"{stage}, output {name}", parity, max_relative)
