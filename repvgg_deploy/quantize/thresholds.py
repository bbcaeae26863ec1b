"""Where to clip activations, from a histogram alone: min-max, percentile, mean square error, entropy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.quantize.recipe import Observer
from repvgg_deploy.quantize.statistics import BINS, EdgeStatistics


def find_threshold(edge: EdgeStatistics, observer: Observer, highest: int, percentile: float = 99.99) -> float:
    """The absolute value that gets the code `highest`, chosen from one edge's statistics; never zero.

    Sources: percentile and entropy as in "Integer Quantization for Deep Learning Inference", section 4.2
    (https://arxiv.org/abs/2004.09602).
    """
    largest = float(edge.largest.max())
    if largest <= 0.0:
        return 1.0
    if observer == "percentile":
        return min(largest, _percentile(edge, percentile))
    if observer == "mse":
        return min(largest, _least_square(edge, highest))
    if observer == "entropy":
        return min(largest, _least_divergence(edge, highest))
    return largest


def _percentile(edge: EdgeStatistics, percentile: float) -> float:
    cumulative = np.cumsum(edge.histogram)
    bin_ = int(np.searchsorted(cumulative, cumulative[-1] * percentile / 100.0))
    return float((bin_ + 1) * edge.limit / BINS)


def _candidates(edge: EdgeStatistics, highest: int) -> list[int]:
    """Numbers of bins to keep: from one a code to the last one in use."""
    used = int(np.flatnonzero(edge.histogram)[-1]) + 1
    return sorted({*range(min(highest + 1, used), used + 1, 8), used})


def _least_square(edge: EdgeStatistics, highest: int) -> float:
    width = edge.limit / BINS
    values = (np.arange(BINS) + 0.5) * width
    costs = []
    for bins in _candidates(edge, highest):
        scale = bins * width / highest
        rounded = np.minimum(np.rint(values / scale), highest) * scale
        costs.append((float((edge.histogram * (rounded - values) ** 2).sum()), bins * width))
    return min(costs)[1]


def _least_divergence(edge: EdgeStatistics, highest: int) -> float:
    """The threshold whose clipped histogram loses the least when it is merged into the codes (Kullback-Leibler)."""
    # Exact zeros need no level of their own: they are represented without an error whatever the scale.
    histogram = edge.histogram.astype(np.float64)
    histogram[0] = 0.0 if histogram[1:].any() else histogram[0]
    costs = [
        (_divergence(histogram, bins, highest + 1), bins * edge.limit / BINS) for bins in _candidates(edge, highest)
    ]
    return min(costs)[1]


def _divergence(histogram: NDArray[np.float64], bins: int, levels: int) -> float:
    kept = histogram[:bins].copy()
    level = np.arange(bins) * levels // bins
    mass = np.bincount(level, weights=kept, minlength=levels)
    filled = np.bincount(level, weights=(kept > 0).astype(np.float64), minlength=levels)
    merged = np.where(kept > 0, (mass / np.maximum(filled, 1.0))[level], 0.0)
    kept[-1] += histogram[bins:].sum()
    if merged.sum() == 0.0:
        return float("inf")
    p, q = kept / kept.sum(), merged / merged.sum()
    where = p > 0
    return float((p[where] * np.log(p[where] / np.maximum(q[where], 1e-12))).sum())
