"""What a layer reads, in the float net and in the quantized one: two streams of the same images, and their moments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg_deploy.errors import DeployError
from repvgg_deploy.quantization.points import BATCH, geometry
from repvgg_deploy.quantization.target import CLIPPING

MEMORY_BYTES = 1 << 29
"""What the kept activations may take, of the widest point and both streams together."""


# In how many units of the last place a sum of many products is off.
_ROUNDINGS = 4

_USUAL = 4.0
"""How many times the median energy an image may have and still count in full."""


@dataclass
class Streams:
    """The same images at the same place of both nets: `exact` in the float net, `rounded` in the quantized one.

    `highest` is the integer of the clipping threshold at this place.
    """

    exact: Tensor
    rounded: Tensor
    highest: int = CLIPPING

    def batches(self, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Both in step, `size` images at a time."""
        yield from zip(torch.split(self.exact, size), torch.split(self.rounded, size), strict=True)

    def image_weights(self) -> Tensor:
        """What each image counts (N), at most 1: less, where its activations are much stronger than usual.

        A few images may drive a net to activations a hundred times the usual ones. In a sum of squares they would
        decide alone, and every other image would pay for them.
        """
        return weights_of_energies(self.exact.flatten(1).double().square().mean(1)).to(self.exact.dtype)

    def thinned(self, count: int) -> Streams:
        """About `count` images of them, evenly spaced."""
        step = max(1, len(self.exact) // count)
        return Streams(self.exact[::step], self.rounded[::step], self.highest)


def weights_of_energies(energy: Tensor) -> Tensor:
    """What each image counts (N), given the mean square of its activations (N), float64; see `Streams`."""
    median = energy.median()
    # Squared, so that weight times energy falls beyond the limit: the strongest image then counts the least.
    weights = (_USUAL * median / energy.clamp_min(1e-300)).clamp(max=1.0).square()
    # Where most images drive nothing at all, as before a dead layer, there is no usual one to compare with.
    return torch.where(median > 0, weights, 1.0)


@dataclass(frozen=True)
class Moments:
    """Weighted means and covariances of one group's inputs over sampled pixels.

    `covariance` (columns, columns) is that of the rounded inputs with themselves, `drift` (filters, columns) that of
    the error they bring to the group's outputs (its weights on exact minus rounded inputs) with them; `samples` pixels
    were used for both. A pixel counts by `Streams.image_weights` and by `weights_of_errors` of its outputs. `noise`
    bounds what float32 has changed of the covariance's eigenvalues: of inputs that hardly differ nothing else is left.
    """

    exact_mean: Tensor
    rounded_mean: Tensor
    covariance: Tensor
    drift: Tensor
    samples: int
    noise: float


def input_moments(streams: Streams, layer: nn.Conv2d | nn.Linear, samples: int, seed: int) -> list[Moments]:
    """The moments of what each group of `layer` reads, over about `samples` pixels spread evenly over the images."""
    generator = torch.Generator().manual_seed(seed)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    filters = layer.weight.flatten(1).chunk(groups)
    each = -(-samples // len(streams.exact))
    sums: list[list[Tensor]] = []
    count = 0
    weights = streams.image_weights()
    for (exact, rounded), weight in zip(streams.batches(), torch.split(weights, BATCH), strict=True):
        a, b = _patches(exact, layer), _patches(rounded, layer)
        if each < a.shape[2]:
            # Drawn on the CPU: the same pixels on every device.
            pixels = torch.randperm(a.shape[2], generator=generator)[:each].to(a.device)
            a, b = a[:, :, pixels], b[:, :, pixels]
        count += a.shape[0] * a.shape[2]
        repeated = weight.repeat_interleave(a.shape[2])
        for group, (x, y) in enumerate(zip(_rows(a, groups), _rows(b, groups), strict=True)):
            # On the outputs, not on the inputs: filters × columns products per pixel instead of columns × columns.
            error = (x - y) @ filters[group].t()
            # Errors from their mean: that much the bias makes up for.
            weight_of_pixel = weights_of_errors((error - error.mean(0)).square().sum(1))
            counted = (repeated * weight_of_pixel)[:, None]
            z = y * counted
            parts = [counted.double().sum(), (x * counted).sum(0), z.sum(0), z.t() @ y, error.t() @ z]
            if len(sums) <= group:
                sums.append(parts)
            else:
                for total, part in zip(sums[group], parts, strict=True):
                    total += part
    return [_moments(parts, weight, count) for parts, weight in zip(sums, filters, strict=True)]


def weights_of_errors(square: Tensor) -> Tensor:
    """What each of several square errors (N) counts, at most 1: less, where it is above the median.

    Where an input is clipped the error is many times the usual one, and no weights make up for it: in a plain sum of
    squares the few such pixels or images would decide alone. So weighted, none adds more to it than the median one: a
    step of robust regression by iteratively reweighted least squares (Holland and Welsch, 1977).
    """
    median = square.median()
    # Where most have no error at all, there is no usual one to compare with.
    return torch.where((square > median) & (median > 0), median / square.clamp_min(1e-30), 1.0)


def _moments(sums: list[Tensor], weight: Tensor, count: int) -> Moments:
    mass = float(sums[0])
    exact, rounded, square, drift = (part / mass for part in sums[1:])
    covariance = square - torch.outer(rounded, rounded)
    drift = drift - torch.outer(weight @ (exact - rounded), rounded)
    # An entry of `square` is off by no more than a few ε √(sᵢ sⱼ), s being its diagonal: a matrix of norm ε Σ s.
    noise = _ROUNDINGS * torch.finfo(square.dtype).eps * float(square.diagonal().sum())
    if not math.isfinite(noise):
        raise DeployError(
            "activations are so large that their squares are not finite",
            "look at the checkpoint: its training diverged",
        )
    return Moments(exact, rounded, covariance, drift, count, noise)


def _patches(x: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """(N, columns of all groups, pixels): what each output pixel is computed from."""
    if isinstance(layer, nn.Linear):
        return x.unsqueeze(2)
    # Like a convolution that copies: the same kernel size, padding, dilation and stride.
    size, padding, dilation, stride = layer.kernel_size, layer.padding, layer.dilation, layer.stride
    assert not isinstance(padding, str)
    return F.unfold(x, size, dilation, padding, stride)


def _rows(patches: Tensor, groups: int) -> Iterator[Tensor]:
    for part in patches.chunk(groups, 1):
        yield part.permute(0, 2, 1).reshape(-1, part.shape[1])


def run_layer(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`layer` with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, **geometry(layer))
