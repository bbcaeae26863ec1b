"""What is said of a row of times: percentiles, spread, and the ratio of two rows with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class TimeStatistics:
    """Of times in milliseconds; percentiles by linear interpolation, as NumPy's.

    `cv` is the coefficient of variation: standard deviation / mean.
    """

    p50: float
    p90: float
    p95: float
    p99: float
    mean: float
    min: float
    max: float
    cv: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> TimeStatistics:
        """The statistics of at least one time."""
        values = np.asarray(milliseconds, dtype=np.float64)
        p50, p90, p95, p99 = (float(v) for v in np.percentile(values, (50, 90, 95, 99)))
        mean = float(values.mean())
        cv = float(values.std() / mean) if mean > 0 else 0.0
        return cls(p50, p90, p95, p99, mean, float(values.min()), float(values.max()), cv)

    def to_dict(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one is as another, with the interval that holds the true ratio with `confidence`."""

    value: float
    low: float
    high: float
    confidence: float
    rounds: int


def compare_rates(
    images: Sequence[float],
    seconds: Sequence[float],
    baseline_images: Sequence[float],
    baseline_seconds: Sequence[float],
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Ratio:
    """The ratio of two throughputs that were measured side by side, round by round.

    Each sequence has one value a round. The ratio is that of all images over all seconds. Its interval is the paired
    percentile bootstrap: rounds are drawn with replacement, the same for both, so that a slow moment of the machine,
    which hits both of a round, does not widen it (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
    The percentiles are expanded for few rounds (Hesterberg, https://doi.org/10.1080/00031305.2015.1089789, section
    4.2). With one round there is no interval, and both ends are the ratio itself.
    """
    columns = [np.asarray(c, dtype=np.float64) for c in (images, seconds, baseline_images, baseline_seconds)]
    rounds = len(columns[0])
    if rounds < 1 or any(len(column) != rounds for column in columns):
        raise ValueError("the two have not the same rounds")
    picks = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))
    n, t, base_n, base_t = (column[picks].sum(1) for column in columns)
    tail = 100 * _expanded_tail(confidence, rounds)
    low, high = np.percentile(n / t / (base_n / base_t), (tail, 100 - tail))
    total_n, total_t, total_base_n, total_base_t = (column.sum() for column in columns)
    return Ratio(float(total_n / total_t / (total_base_n / total_base_t)), float(low), float(high), confidence, rounds)


def _expanded_tail(confidence: float, rounds: int) -> float:
    """The share to cut off at each end: less than (1 − confidence) / 2, as Student's t has wider tails."""
    tail = (1 - confidence) / 2
    if rounds < 3:
        return tail
    normal, freedom = NormalDist(), rounds - 1
    z = -normal.inv_cdf(tail)
    # Student's quantile from the normal one (Cornish and Fisher), within 1 % from 4 degrees of freedom on.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-math.sqrt(rounds / freedom) * t)
