"""What is said of a row of times: percentiles, spread, and the ratio of two rows with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

CONFIDENCE = 0.95

# The bounds are those of a record from a file.
Milliseconds = Annotated[float, Meta(gt=0, le=1e12)]


@dataclass(frozen=True)
class TimeStatistics:
    """Of times in milliseconds; percentiles by linear interpolation, as NumPy's.

    `cv` is the coefficient of variation: standard deviation / mean.
    """

    p50: Milliseconds
    p90: Milliseconds
    p95: Milliseconds
    p99: Milliseconds
    mean: Milliseconds
    min: Milliseconds
    max: Milliseconds
    cv: Annotated[float, Meta(ge=0, le=1e18)]

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
) -> Ratio:
    """The ratio of two throughputs that were measured side by side, round by round.

    Each sequence has one value per round. The ratio is the median of the rounds' ratios: a slow moment of the machine
    hits both of a round, and where it hits one of them, the median does not care. The interval is that of the sign
    test: two of the sorted ratios, which hold the true median with at least `confidence` whatever the distribution of
    the times is (Conover, Practical Nonparametric Statistics, section 3.2). Below 6 rounds nothing can be said with
    95 %: then it is the smallest to the largest, with the confidence that this has.
    """
    columns = [np.asarray(c, dtype=np.float64) for c in (images, seconds, baseline_images, baseline_seconds)]
    rounds = len(columns[0])
    if rounds < 1 or any(len(column) != rounds for column in columns):
        raise ValueError("the two series have different numbers of rounds")
    n, t, base_n, base_t = columns
    ratios = np.sort(n / t / (base_n / base_t))
    outside = _rank_of_end(confidence, rounds)
    if outside is None:
        outside, confidence = 0, 1.0 - 2.0 ** (1 - rounds)
    low, high = ratios[outside], ratios[rounds - 1 - outside]
    return Ratio(float(np.median(ratios)), float(low), float(high), confidence, rounds)


def _rank_of_end(confidence: float, rounds: int) -> int | None:
    """How many of the sorted values lie outside each end of the interval; None if there are too few of them."""
    tail, found = 0.0, None
    for outside in range(rounds // 2):
        # P(at most so many of the values are below the true median), binomial with p = 1/2.
        tail += math.comb(rounds, outside) * 0.5**rounds
        if tail > (1 - confidence) / 2:
            break
        found = outside
    return found
