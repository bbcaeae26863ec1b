"""All 256 codes for an activation without a zero-point, which TensorRT does not know: a few constant channels instead.

Behind a ReLU a symmetric int8 uses 0…127 only. Held 128 steps lower, the same values use −128…127, and the saturation
at −128 is the ReLU. With a code u = c + 128 a convolution's sum Σ w·u is Σ w·c + 128·Σ w, over those taps that are
inside the image. The second sum cannot go into the bias, because it is another one at the borders, where padding brings
in c = 0, which would be u = 128. But a channel that is −128 everywhere is zero in the padding as well: read with
weights whose sum is −Σ w, it adds just that, tap for tap. Everything is a whole number, so nothing is lost.

The convolution in front makes the constant channels with filters of zeros and a bias. A few channels do, because a
weight holds 127 at most; `count_constants` says how many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repvgg_deploy.quantize.codes import LOWEST
from repvgg_deploy.quantize.weight_scales import LEVELS


def count_constants(weight: Tensor) -> int:
    """How many constant channels the integers of a kernel (filters, columns, height, width) need."""
    largest = int(weight.sum(1, dtype=torch.int32).abs().max())
    return -(-largest // LEVELS)


def read_constants(weight: Tensor) -> Tensor:
    """int8 `weight` (filters, columns, height, width) with the columns that read its constant channels, at the end."""
    rest = -weight.sum(1, dtype=torch.int32)
    columns = []
    for _ in range(count_constants(weight)):
        columns.append(rest.clamp(-LEVELS, LEVELS))
        rest = rest - columns[-1]
    return torch.cat([weight, *(column[:, None].to(torch.int8) for column in columns)], 1)


def make_constants(
    weight: Tensor, scale: Tensor, bias: Tensor, input_scale: Tensor, output_scale: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, scale and bias of a layer whose outputs are to be 128 steps lower, with `count` constant ones at the end.

    Args:
        weight: int8 (filters, columns, height, width).
        scale: of the weights (filters).
        bias: (filters), in units of the outputs.
        input_scale: of the layer's inputs.
        output_scale: of the outputs' codes.
        count: see `count_constants`, of the layer that reads them.
    """
    weight = torch.cat([weight, weight.new_zeros(count, *weight.shape[1:])])
    # With this scale a step of the sums is one of the codes.
    scale = torch.cat([scale, (output_scale / input_scale).expand(count)])
    lowered = torch.cat([bias, bias.new_zeros(count)]) + LOWEST * output_scale
    unit = scale * input_scale
    return weight, scale, (lowered / unit).round() * unit
