"""Percentiles and the interval of a ratio."""

from __future__ import annotations

import numpy as np
import pytest

from repvgg_deploy.timing_statistics import TimeStatistics, compare_rates


def test_statistics_of_one_time() -> None:
    found = TimeStatistics.of([4.0])
    assert found.to_dict() == dict.fromkeys(("p50", "p90", "p95", "p99", "mean", "min", "max"), 4.0) | {"cv": 0.0}


def test_the_coefficient_of_variation() -> None:
    assert TimeStatistics.of([9.0, 11.0]).cv == pytest.approx(0.1)


@pytest.mark.parametrize("rounds", [10, 30])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(rounds: int) -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        noise = generator.lognormal(0, 0.1, rounds)
        a, b = (noise * generator.lognormal(0, 0.02, rounds) * seconds for seconds in (1.0, 1.5))
        ratio = compare_rates([1.0] * rounds, a, [1.0] * rounds, b)
        hits += ratio.low <= 1.5 <= ratio.high
    assert 0.925 <= hits / 400 <= 0.975


def test_noise_that_hits_both_does_not_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    noise = generator.lognormal(0, 0.3, 30)
    paired = compare_rates([1.0] * 30, noise, [1.0] * 30, noise * 2)
    apart = compare_rates([1.0] * 30, noise, [1.0] * 30, generator.permutation(noise) * 2)
    assert paired.high - paired.low < 1e-9 < apart.high - apart.low


def test_one_round_has_no_interval() -> None:
    ratio = compare_rates([4.0], [1.0], [2.0], [1.0])
    assert (ratio.low, ratio.value, ratio.high) == (2.0, 2.0, 2.0)


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="same rounds"):
        compare_rates([1.0, 1.0], [1.0, 1.0], [1.0], [1.0])
