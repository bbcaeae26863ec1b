"""Which layers to keep in float: the error that each one's rounding alone makes, against what it costs in MACs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from repvgg_deploy.nets.cost import count_layer_macs
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.net import QuantizedNet
from repvgg_deploy.quantization.points import BATCH, CLASSIFIER, Images
from repvgg_deploy.quantization.quantize import quantize, quantize_apart
from repvgg_deploy.quantization.recipe import Recipe
from repvgg_deploy.quantization.reconstruct import take_images
from repvgg_deploy.quantization.state import Reconstruction
from repvgg_deploy.quantization.statistics import CalibrationStatistics, collect_statistics
from repvgg_deploy.torch_precision import float32

RANKING_IMAGES = 128


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer: `error` is the `lead_at_risk` where it alone is int8.

    `macs_share` is its share of the net's multiply-adds.
    """

    name: str
    error: float
    macs_share: float

    @property
    def gain(self) -> float:
        """Error removed per multiply-add that returns to float."""
        return self.error / self.macs_share


@float32()
@torch.no_grad()
def rank_layers(net: QuantizedNet, images: Tensor) -> tuple[LayerSensitivity, ...]:
    """The quantized layers of `net`, the one worth most to keep float first, measured on `images` (N, C, H, W).

    Args:
        net: from `quantize_apart`: a layer that makes up for the error of others is wrong without them.
        images: a hundred or so, of all kinds.
    """
    macs = count_layer_macs(net.float_net.spec, *images.shape[2:])
    total = sum(macs.values())
    exact = _run(net.float_net, images)
    found = []
    for name, integers in net.integers().items():
        # The pair before the pool stands there for the classifier's sake.
        pool = None if net.pool_scale is None or name != CLASSIFIER else float(net.pool_scale)
        alone = QuantizedNet(net.float_net, Reconstruction({name: integers}, pool))
        error = lead_at_risk(exact, _run(alone, images))
        found.append(LayerSensitivity(name, error, macs[name] / total))
    return tuple(sorted(found, key=lambda layer: -layer.gain))


def lead_at_risk(exact: Tensor, logits: Tensor) -> float:
    """How much of the first class's lead over the second is at risk in `logits` (N, classes), from 0 to 1.

    The mean over the images of |change of the lead| / (|change of the lead| + lead): an image with enormous activations
    counts no more than any other, and one whose first class is beyond doubt hardly counts. The lead of a single class
    is its score.
    """
    best = exact.topk(min(2, exact.shape[1]), 1).indices
    signs = exact.new_tensor([1.0, -1.0])[: best.shape[1]]
    before, after = ((scores.gather(1, best) * signs).sum(1) for scores in (exact, logits))
    change = (after - before).abs()
    return float((change / (change + before.abs()).clamp_min(torch.finfo(exact.dtype).tiny)).mean())


def _run(net: torch.nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(batch) for batch in torch.split(images, BATCH)])


@torch.no_grad()
def layers_within(ranking: tuple[LayerSensitivity, ...], share: float) -> tuple[str, ...]:
    """The first layers of `ranking` whose MACs together stay within `share`; one that is too large is passed over."""
    chosen, used = [], 0.0
    for layer in ranking:
        if used + layer.macs_share <= share:
            chosen.append(layer.name)
            used += layer.macs_share
    return tuple(chosen)


@dataclass(frozen=True)
class DropLimit:
    """The most that a candidate may lose: `measure` gives what it loses, in the unit of `most` (points of top-1)."""

    measure: Callable[[QuantizedNet], float]
    most: float


@dataclass(frozen=True)
class MixedPrecision:
    """A quantized net within a limit: what stays float, its share of the MACs, and the drop that was measured."""

    net: QuantizedNet
    kept_float: tuple[str, ...]
    macs_share: float
    drop: float


def quantize_within(
    fused: RepVGG,
    images: Images,
    recipe: Recipe,
    limit: DropLimit,
    statistics: CalibrationStatistics | None = None,
    keep_float: Collection[str] = (),
) -> MixedPrecision:
    """The net with the fewest float layers, taken in the order of `rank_layers`, whose drop is within `limit`.

    The number of layers is found by bisection, and each candidate is quantized anew with its float layers; at least one
    layer stays int8. If no candidate is good enough the best one that was seen comes back; compare its `drop`.

    Args:
        fused: see `quantize`.
        images: see `quantize`.
        recipe: see `quantize`.
        limit: how the drop is measured, and the most of it.
        statistics: see `quantize`.
        keep_float: names of layers that are not quantized in any candidate.
    """
    if statistics is None:
        statistics = collect_statistics(fused, images, augmentations=recipe.augmentations)
    sample = take_images(fused, images, statistics.images, RANKING_IMAGES)
    macs = count_layer_macs(fused.spec, *sample.shape[2:])

    def attempt(names: tuple[str, ...]) -> MixedPrecision:
        net = quantize(fused, images, recipe, statistics, names)
        share = sum(macs[name] for name in names) / sum(macs.values())
        return MixedPrecision(net, names, share, limit.measure(net))

    always = tuple(dict.fromkeys(keep_float))
    best = attempt(always)
    if best.drop <= limit.most:
        return best
    apart = quantize_apart(fused, images, recipe, statistics, always)
    ranking = rank_layers(apart, sample)
    low, high = 0, len(ranking)
    # Bisection takes the drop to fall with each layer that returns to float. It need not, quite: so what is returned
    # has been measured itself.
    while high - low > 1:
        middle = (low + high) // 2
        mixed = attempt((*always, *(layer.name for layer in ranking[:middle])))
        if mixed.drop <= limit.most:
            high, best = middle, mixed
        else:
            low = middle
            best = min(best, mixed, key=lambda found: found.drop) if best.drop > limit.most else best
    return best
