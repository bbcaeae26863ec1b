"""Where to clip activations, from a histogram alone: min-max, percentile, mean square error, entropy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.quantize.recipe import Observer
from repvgg_deploy.quantize.statistics import BINS, EdgeStatistics

LEVELS = 127
"""The largest integer of a symmetric int8 activation; behind a ReLU there are no negative ones."""


def find_threshold(edge: EdgeStatistics, observer: Observer, percentile: float = 99.99) -> float:
    """The absolute value that becomes 127, chosen from one edge's statistics; never zero.

    Sources: percentile and entropy as in "Integer Quantization for Deep Learning Inference", section 4.2
    (https://arxiv.org/abs/2004.09602).
    """
    largest = float(edge.largest.max())
    if largest <= 0.0:
        return 1.0
    if observer == "percentile":
        return min(largest, _percentile(edge, percentile))
    if observer == "mse":
        return min(largest, _least_square(edge))
    if observer == "entropy":
        return min(largest, _least_divergence(edge))
    return largest


def _percentile(edge: EdgeStatistics, percentile: float) -> float:
    cumulative = np.cumsum(edge.histogram)
    bin_ = int(np.searchsorted(cumulative, cumulative[-1] * percentile / 100.0))
    return float((bin_ + 1) * edge.limit / BINS)


def _candidates(edge: EdgeStatistics) -> list[int]:
    """Numbers of bins to keep: from 128 to the last one in use."""
    used = int(np.flatnonzero(edge.histogram)[-1]) + 1
    return sorted({*range(min(LEVELS + 1, used), used + 1, 8), used})


def _least_square(edge: EdgeStatistics) -> float:
    width = edge.limit / BINS
    values = (np.arange(BINS) + 0.5) * width
    costs = []
    for bins in _candidates(edge):
        scale = bins * width / LEVELS
        rounded = np.minimum(np.rint(values / scale), LEVELS) * scale
        costs.append((float((edge.histogram * (rounded - values) ** 2).sum()), bins * width))
    return min(costs)[1]


def _least_divergence(edge: EdgeStatistics) -> float:
    """The threshold whose clipped histogram loses the least when it is merged into 128 levels (Kullback-Leibler)."""
    # Exact zeros need no level of their own: they are represented without an error whatever the scale.
    histogram = edge.histogram.astype(np.float64)
    histogram[0] = 0.0 if histogram[1:].any() else histogram[0]
    costs = [(_divergence(histogram, bins), bins * edge.limit / BINS) for bins in _candidates(edge)]
    return min(costs)[1]


def _divergence(histogram: NDArray[np.float64], bins: int) -> float:
    kept = histogram[:bins].copy()
    level = np.arange(bins) * (LEVELS + 1) // bins
    mass = np.bincount(level, weights=kept, minlength=LEVELS + 1)
    filled = np.bincount(level, weights=(kept > 0).astype(np.float64), minlength=LEVELS + 1)
    merged = np.where(kept > 0, (mass / np.maximum(filled, 1.0))[level], 0.0)
    kept[-1] += histogram[bins:].sum()
    if merged.sum() == 0.0:
        return float("inf")
    p, q = kept / kept.sum(), merged / merged.sum()
    where = p > 0
    return float((p[where] * np.log(p[where] / np.maximum(q[where], 1e-12))).sum())
