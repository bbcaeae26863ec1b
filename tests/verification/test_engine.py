"""Outputs that no classifier gives fail the build; and so do those that are too far from the graph's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.engine_graphs import rtx_backend, small_onnx
from helpers.progress import Heard

from repvgg_deploy.engine import BuildOptions, build_engine
from repvgg_deploy.errors import VerificationError
from repvgg_deploy.hardware.gpus import find_gpus
from repvgg_deploy.verification.engine import check_where_possible, require_signal

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


@pytest.mark.slow
@pytest.mark.skipif(bool(find_gpus().gpus), reason="this machine has a GPU")
def test_an_engine_that_cannot_run_here_is_said_to_be_unverified(tmp_path: Path) -> None:
    engine = build_engine(small_onnx(tmp_path), rtx_backend(), BuildOptions(timing_cache=False), tmp_path)
    heard = Heard()
    assert check_where_possible(engine, np.zeros((1, 3, 32, 32), np.float32), dict, heard) is None
    assert heard.notes == [f"note: the engine was built but not run: {find_gpus().reason}"]
