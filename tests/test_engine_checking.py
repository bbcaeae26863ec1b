"""Outputs that no classifier gives fail the build; and so do those that are too far from the graph's."""

from __future__ import annotations

import numpy as np
import pytest

from repvgg_deploy.engine.checking import require_signal
from repvgg_deploy.errors import VerificationError

GOOD = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)


def with_value(value: float) -> np.ndarray:
    broken = GOOD.copy()
    broken[2, 3] = value
    return broken


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (np.zeros((4, 10), np.float16), "zeros only"),
        (with_value(np.nan), "NaN or Inf"),
        (with_value(np.inf), "NaN or Inf"),
        (np.full((4, 10), 0.1, np.float32), "the same score for every class"),
        (np.vstack([GOOD[:3], np.ones((1, 10), np.float32)]), "the same score for every class"),
        (np.tile(GOOD[:1], (4, 1)), "the same scores for every image"),
    ],
)
def test_outputs_without_a_signal_are_refused(scores: np.ndarray, said: str) -> None:
    with pytest.raises(VerificationError, match=said):
        require_signal(scores)


@pytest.mark.parametrize("scores", [GOOD, GOOD[:1], GOOD[:, :1]], ids=["batch", "one image", "one class"])
def test_real_outputs_pass(scores: np.ndarray) -> None:
    require_signal(scores)
