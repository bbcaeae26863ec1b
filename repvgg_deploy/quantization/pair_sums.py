"""Weights that no CPU's integer kernel can overflow: what two neighbours may add up to in 16 bits.

An x86 CPU without VNNI multiplies unsigned by signed bytes with `vpmaddubsw`, which adds the products of two
neighbouring columns in 16 bits and saturates there. The kernel's inputs are integers from 0 to 255: a signed input is
held 128 higher, and ONNX Runtime keeps unsigned integers beyond the clipping threshold up to 255. So the sum cannot
saturate, whatever the input, if the weights of one sign in each pair add up to at most 128: 255 · 128 = 32,640.

Which columns are neighbours:

- ONNX Runtime lays a convolution out as the product of a matrix of patches, one group at a time, with the channels of a
  tap next to one another and the taps in a row, and pairs neighbours from the start; where the number of channels is
  odd, pairs reach from one tap to the next. Read in MLAS: `QgemmU8X8KernelAvx2.S`, `ConvSymKernelAvx2.S` and the
  patches of `qlinearconv.cpp` (https://github.com/microsoft/onnxruntime, `onnxruntime/core`).
- OpenVINO does the same, or begins every tap anew and fills up with a zero.

Both were confirmed for either runtime by convolutions with two weights of 127 at all pairs of places.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LEVELS = 127
"""Weights use −127…127, so that their negative is an int8 as well."""

MOST = 128
"""What the weights of one sign in a pair may add up to."""

# The largest input of such a kernel: a uint8, or an int8 held 128 higher.
_LARGEST_INTEGER = 255
INT16_MAX = 32767


def count_taps(weight: Tensor) -> int:
    """The places of a kernel (filters, channels, height, width); 1 for a linear layer (filters, columns)."""
    return weight[0, 0].numel()


Index = tuple[slice | Tensor, ...]


@lru_cache(maxsize=128)
def neighbours(channels: int, taps: int) -> tuple[tuple[Index, Index], ...]:
    """The columns whose products a kernel may add in 16 bits: for each way of pairing, all firsts and all seconds.

    They are indices of a tensor (filters, channels, taps); `channels` are those of one group.
    """
    whole = channels // 2 * 2
    everything = slice(None)
    ways: list[tuple[Index, Index]] = []
    if whole:
        ways.append(((everything, slice(0, whole, 2)), (everything, slice(1, whole, 2))))
    if channels % 2 and taps > 1:
        # Tap by tap in one row, as ONNX Runtime has them: pairs reach from one tap to the next.
        place = torch.arange(channels * taps)[: channels * taps // 2 * 2]
        tap, channel = place // channels, place % channels
        first, second = ((everything, channel[k::2], tap[k::2]) for k in (0, 1))
        ways.append((first, second))
    return tuple(ways)


def excess(first: Tensor, second: Tensor) -> Tensor:
    """By how much the magnitudes of two weights of the same sign, in integer steps, are together too large."""
    # Neither exceeds 127, so two of opposite signs never do.
    return (first + second).abs_().sub_(MOST).clamp_min_(0)


def round_in_pairs(values: Tensor, taps: int, importance: Tensor | None = None) -> Tensor:
    """The nearest integers −127…127 of `values` (filters, columns) with which no pair can saturate, as floats.

    What a pair has too much is taken from both weights, the less from the more important one.

    Args:
        values: weights divided by their scales, one row per filter; a column per channel and tap.
        taps: see `count_taps`.
        importance: of each column (columns) or weight (filters, columns): the mean square of its input.
    """
    rounded = values.clamp(-LEVELS, LEVELS).reshape(len(values), -1, taps)
    if importance is not None:
        importance = importance.expand(values.shape).reshape(rounded.shape)
    for pair in neighbours(rounded.shape[1], taps):
        _share_excess(rounded, pair, importance)
    rounded.round_()
    # Both halves of a sum of exactly 128 round to 128; only where float arithmetic missed it is there a step to take.
    for pair in neighbours(rounded.shape[1], taps):
        _share_excess(rounded, pair, None, first=1.0)
    return rounded.flatten(1)


def _share_excess(values: Tensor, pair: tuple[Index, Index], importance: Tensor | None, first: float = 0.5) -> None:
    """Take what pairs have too much from `values` in place; without `importance` the share `first` from the first."""
    a, b = values[pair[0]], values[pair[1]]
    over = excess(a, b)
    found = over.nonzero(as_tuple=True)
    if not len(found[0]):
        return
    share: Tensor | float = first
    if importance is not None:
        of_a, of_b = importance[pair[0]][found], importance[pair[1]][found]
        share = of_b / (of_a + of_b).clamp_min(torch.finfo(of_a.dtype).tiny)
    # Few pairs have too much: so only those are touched.
    a[found] -= a[found].sign() * over[found] * share
    b[found] -= b[found].sign() * over[found] * (1 - share)
    values[pair[0]], values[pair[1]] = a, b


def largest_pair_sum(weight: Tensor) -> int:
    """The largest magnitude that the sum of two products can reach in a kernel that adds them in 16 bits.

    An exact bound over all inputs, not a sample. At most `INT16_MAX` means that no pair can saturate.

    Args:
        weight: integers (filters, channels of a group, height, width) or (filters, columns).
    """
    taps = count_taps(weight)
    rows = weight.to(torch.int32).reshape(len(weight), -1, taps)
    largest = int(rows.abs().max())
    for first, second in neighbours(rows.shape[1], taps):
        a, b = rows[first], rows[second]
        # Products of one sign alone are the worst case: the input of the other weight may be 0.
        positive = a.clamp_min(0) + b.clamp_min(0)
        negative = a.clamp_max(0) + b.clamp_max(0)
        largest = max(largest, int(positive.max()), -int(negative.min()))
    return _LARGEST_INTEGER * largest
