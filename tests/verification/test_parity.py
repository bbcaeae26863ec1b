"""How two arrays of logits are compared, and what fails a command."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_deploy.errors import VerificationError
from repvgg_deploy.verification.parity import compare, require_parity

A = np.array([[3.0, 4.0], [0.0, 1.0]])


def test_equal_outputs_do_not_differ() -> None:
    parity = compare(A, A)
    assert (parity.max_abs, parity.relative, parity.top1_agreement, parity.images) == (0, 0, 100, 2)
    assert parity.cosine == pytest.approx(1)


def test_max_abs_is_the_largest_difference_of_a_logit() -> None:
    assert compare(A, A + np.array([[0, 0.25], [-0.5, 0]])).max_abs == 0.5


def test_relative_is_the_norm_of_the_difference_over_that_of_the_reference() -> None:
    b = A + np.array([[0.3, 0], [0, 0.4]])
    assert compare(A, b).relative == pytest.approx(0.5 / math.sqrt(26))
    assert compare(b, A).relative == pytest.approx(0.5 / np.linalg.norm(b))


def test_cosine_is_the_smallest_over_the_images() -> None:
    assert compare(A, np.array([[3.0, 4.0], [1.0, 1.0]])).cosine == pytest.approx(math.sqrt(0.5))


def test_top1_agreement_is_in_percent_of_the_images() -> None:
    reference = np.eye(4)
    assert compare(reference, reference[[0, 1, 2, 0]]).top1_agreement == 75


def test_images_that_both_models_answer_with_zeros_agree() -> None:
    zeros = np.zeros((2, 3))
    parity = compare(zeros, zeros)
    assert (parity.relative, parity.cosine, parity.top1_agreement) == (0, 1, 100)


def test_output_that_vanished_is_a_difference() -> None:
    parity = compare(A, np.zeros_like(A))
    assert parity.relative == 1
    assert parity.cosine == 0


def test_differences_are_computed_in_float64() -> None:
    reference = np.array([[60000.0, 1.0]], np.float16)
    assert compare(reference, -reference).max_abs == 120_000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("which", "first"), [("first", True), ("second", False)])
def test_output_that_is_no_number_is_an_error(value: float, which: str, first: bool) -> None:
    bad = A.copy()
    bad[1, 0] = value
    with pytest.raises(VerificationError, match=f"the {which} model's outputs contain NaN or Inf"):
        compare(*((bad, A) if first else (A, bad)))


def test_different_shapes_are_an_error_that_names_both() -> None:
    with pytest.raises(VerificationError, match=r"\(2, 2\) and \(2, 3\)"):
        compare(A, np.zeros((2, 3)))


def test_difference_up_to_the_limit_passes_and_beyond_it_fails() -> None:
    parity = compare(A, A * 1.125)
    require_parity("stage", parity, 0.125)
    with pytest.raises(VerificationError, match=r"stage: the outputs differ by 1\.25e-01") as caught:
        require_parity("stage", parity, 0.1249)
    assert "nothing was written" in caught.value.hint


@pytest.mark.parametrize("limit", [float("nan"), -1.0])
def test_limit_that_nothing_can_meet_fails(limit: float) -> None:
    with pytest.raises(VerificationError):
        require_parity("stage", compare(A, A), limit)


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-30, 1e30), noise=st.floats(0, 1e-2))
def test_relative_and_cosine_do_not_depend_on_the_scale(scale: float, noise: float) -> None:
    b = A + np.array([[noise, 0], [0, -noise]])
    small, large = compare(A, b), compare(A * scale, b * scale)
    assert large.relative == pytest.approx(small.relative, rel=1e-6, abs=1e-12)
    assert large.cosine == pytest.approx(small.cosine)
