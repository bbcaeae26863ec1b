"""Percentiles and the interval of a ratio."""

from __future__ import annotations

import numpy as np
import pytest

from repvgg_deploy.benchmark.statistics import TimeStatistics, compare_rates


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
    assert 0.935 <= hits / 400 <= 0.99


def test_noise_that_hits_both_does_not_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    noise = generator.lognormal(0, 0.3, 30)
    paired = compare_rates([1.0] * 30, noise, [1.0] * 30, noise * 2)
    apart = compare_rates([1.0] * 30, noise, [1.0] * 30, generator.permutation(noise) * 2)
    assert paired.high - paired.low < 1e-9 < apart.high - apart.low


def test_a_round_that_was_disturbed_does_not_move_the_ratio() -> None:
    seconds = [1.0] * 19 + [50.0]
    ratio = compare_rates([1.0] * 20, seconds, [1.0] * 20, [2.0] * 20)
    assert (ratio.low, ratio.value, ratio.high) == (2.0, 2.0, 2.0)


def test_the_ends_are_those_of_the_sign_test() -> None:
    """With 10 values the second and the ninth, with 20 the sixth and the fifteenth (Conover, table A3)."""
    for rounds, low, high in ((10, 2.0, 9.0), (20, 6.0, 15.0)):
        values = np.arange(1.0, rounds + 1)
        ratio = compare_rates(values, [1.0] * rounds, [1.0] * rounds, [1.0] * rounds)
        assert (ratio.low, ratio.high, ratio.confidence) == (low, high, 0.95)


def test_few_rounds_say_how_little_they_say() -> None:
    ratio = compare_rates([4.0, 2.0, 6.0], [1.0] * 3, [2.0] * 3, [1.0] * 3)
    assert (ratio.low, ratio.value, ratio.high, ratio.confidence) == (1.0, 2.0, 3.0, 0.75)
    assert compare_rates([4.0], [1.0], [2.0], [1.0]).confidence == 0.0


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="different numbers of rounds"):
        compare_rates([1.0, 1.0], [1.0, 1.0], [1.0], [1.0])
