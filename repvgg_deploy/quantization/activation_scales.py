"""The scale of one edge: the clipping threshold whose layer output is nearest to the float net's."""

from __future__ import annotations

from torch import Tensor, nn

from repvgg_deploy.quantization.activation_range import CLIPPING, LOWEST
from repvgg_deploy.quantization.layer_inputs import Streams, run_layer

_IMAGES = 64


def quantize_activations(x: Tensor, scale: float) -> Tensor:
    """`x` rounded (half to even) and saturated with this scale, as floats that integer · scale gives."""
    return (x / scale).round_().clamp_(LOWEST, CLIPPING).mul_(scale)


def output_error(streams: Streams, layer: nn.Module, scale: float) -> float:
    """The square error of `layer`'s output where its input is quantized; a constant offset a channel is no error.

    `layer` is a convolution or linear layer, or anything else for the mean over height and width.
    """
    exact, rounded = streams.exact, quantize_activations(streams.rounded, scale)
    if isinstance(layer, nn.Conv2d | nn.Linear):
        difference = run_layer(layer, rounded - exact, layer.weight, None)
    else:
        difference = (rounded - exact).mean((2, 3))
    weights = streams.image_weights()[:, None]
    flat = difference.flatten(2) if difference.dim() > 2 else difference.unsqueeze(2)
    # The mean is what bias correction removes.
    mean = (flat.mean(2) * weights).sum(0) / weights.sum()
    return float(((flat - mean[:, None]).square().sum((1, 2)) * weights[:, 0]).double().sum())


def scale_by_output(streams: Streams, layer: nn.Module, thresholds: tuple[float, ...]) -> float:
    """The scale with the least output error; `thresholds` are shares of the largest input that images usually have.

    The usual one is the largest of those images that count in full (see `Streams.image_weights`).

    A signed input (the images) is never clipped: its values are bounded, and as frequent at the border as elsewhere.
    """
    usual = streams.image_weights() >= 1.0
    largest = float(streams.rounded[usual].abs().amax())
    if largest == 0.0:
        return 1.0 / CLIPPING
    if float(streams.rounded.amin()) < 0:
        return largest / CLIPPING
    sample = streams.thinned(_IMAGES)
    scales = [largest * share / CLIPPING for share in sorted(thresholds, reverse=True)]
    return min(scales, key=lambda scale: output_error(sample, layer, scale))
