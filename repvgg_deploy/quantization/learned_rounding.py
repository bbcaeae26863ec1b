"""Learned rounding: weights, scales and biases descend together on the distance to the float net's answers.

Rounding has no gradient of use, so it passes through unchanged, and the scales get the gradient of the rounding error.
No labels are used; see `augment` for the images. Sources: "Learned Step Size Quantization"
(https://arxiv.org/abs/1902.08153) for the scales; BRECQ (https://arxiv.org/abs/2102.05426) for features as targets
beside the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.quantization.augmentation import draw_pictures
from repvgg_deploy.quantization.layer_inputs import run_layer, weights_of_errors
from repvgg_deploy.quantization.pair_sums import count_taps, round_in_pairs
from repvgg_deploy.quantization.points import CLASSIFIER, POOL, Images, after_conv, fused_blocks, per_channel, rebatch
from repvgg_deploy.quantization.state import LayerIntegers, QuantizationState, Reconstruction
from repvgg_deploy.quantization.target import LOWEST, highest_integers

# Weights move by a share of one integer step. Scales, held as logarithms, move by this part of it, as a share of what
# they are; biases too, in the units of the activations.
_SLOWER = 0.02
# Steps over which the rates rise: Adam's first estimates of the gradients' variance are poor.
_WARM_UP = 10
_MEMORY_BYTES = 1 << 29


class _RoundActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, highest: int) -> Tensor:
        ratio = x / scale
        rounded = ratio.round().clamp_(LOWEST, highest)
        ctx.save_for_backward(ratio, rounded)
        ctx.highest = highest
        return rounded * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        ratio, rounded = ctx.saved_tensors
        (grad,) = grad_outputs
        # The gradient of the scale is that of LSQ, equation 3: the rounding error inside the range, and beyond it the
        # integer that the value saturates at.
        inside = (ratio >= LOWEST) & (ratio <= ctx.highest)
        return grad * inside, (grad * torch.where(inside, rounded - ratio, rounded)).sum(), None


def _round_activations(x: Tensor, log_scale: Tensor, highest: int) -> Tensor:
    return cast(Tensor, _RoundActivations.apply(x, log_scale.exp(), highest))  # type: ignore[no-untyped-call]


def _round_weights(weight: Tensor) -> Tensor:
    return round_in_pairs(weight.flatten(1), count_taps(weight)).reshape(weight.shape)


class _RoundWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:  # noqa: ARG004
        return _round_weights(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # noqa: ARG004
        return grad_outputs[0]


@dataclass
class _Learnable:
    """The parameters of one layer; scales are held as logarithms, so that they stay positive."""

    weight: Tensor
    log_scale: Tensor
    bias: Tensor
    log_input: Tensor

    @classmethod
    def start(cls, layer: LayerIntegers) -> _Learnable:
        device = layer.weight.device
        log_input = torch.tensor(math.log(layer.input_scale), device=device)
        parts = (layer.weight.float(), layer.weight_scale.log(), layer.bias.clone(), log_input)
        weight, log_scale, bias, log_input = (part.requires_grad_() for part in parts)
        return cls(weight, log_scale, bias, log_input)

    def run(self, layer: nn.Conv2d | nn.Linear, x: Tensor, highest: int) -> Tensor:
        x = _round_activations(x, self.log_input, highest)
        rounded = cast(Tensor, _RoundWeights.apply(self.weight))  # type: ignore[no-untyped-call]
        return run_layer(layer, x, rounded * per_channel(self.log_scale.exp(), rounded), self.bias)

    def integers(self) -> LayerIntegers:
        weight = _round_weights(self.weight.detach()).to(torch.int8)
        scale = float(self.log_input.detach().exp())
        return LayerIntegers(weight, self.log_scale.detach().exp(), self.bias.detach().clone(), scale)


def learn(state: QuantizationState, images: Images, progress: Progress = SILENT) -> QuantizationState:
    """Improve the integers by descent on the distance of logits and stage outputs to those of the float net.

    Given: the `result` of `reconstruct`. Gives: a `result` of the same layers with other values; the same one if the
    recipe's `learning` has no steps.

    Augmentations are drawn from `images`; the draws depend on the recipe's seed alone. TensorRT and ONNX Runtime
    saturate at different integers, so the steps take turns.
    """
    net, start, recipe = state.net, state.integers, state.recipe
    options = recipe.learning
    if not options.steps:
        return state
    kept = _keep_images(images, net.device)
    turns = [highest_integers(net, highest) for highest in state.grid.saturations]
    layers = {name: _Learnable.start(layer) for name, layer in start.layers.items()}
    pool = None
    if start.pool_scale is not None:
        pool = torch.tensor(math.log(start.pool_scale), device=kept.device, requires_grad=True)
    optimizer = _optimizer(layers, pool, options.rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    pictures = draw_pictures(kept, options.batch, recipe.seed)
    for step in range(options.steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / options.steps)) * min(1.0, (step + 1) / _WARM_UP)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay
        loss = _distance(net, layers, pool, turns[step % len(turns)], next(pictures), options.features)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress.step("learning", step + 1, options.steps)
    scale = None if pool is None else float(pool.detach().exp())
    result = Reconstruction({name: layer.integers() for name, layer in layers.items()}, scale)
    return replace(state, result=result)


def _keep_images(images: Images, device: torch.device) -> Tensor:
    """As many images as the memory allows, from the first on."""
    kept: list[Tensor] = []
    size = 0
    for batch in rebatch(images, device):
        kept.append(batch)
        size += batch.numel() * batch.element_size()
        if size > _MEMORY_BYTES:
            break
    return torch.cat(kept)


def _optimizer(layers: dict[str, _Learnable], pool: Tensor | None, rate: float) -> torch.optim.Adam:
    weights = [layer.weight for layer in layers.values()]
    scales = [part for layer in layers.values() for part in (layer.log_scale, layer.log_input)]
    biases = [layer.bias for layer in layers.values()]
    groups = [
        {"params": weights, "lr": rate},
        {"params": scales + ([] if pool is None else [pool]), "lr": rate * _SLOWER},
        {"params": biases, "lr": rate * _SLOWER},
    ]
    # Without LSQ's factor on the gradients of scales: Adam divides by their size in any case.
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def _distance(
    net: RepVGG,
    layers: dict[str, _Learnable],
    pool: Tensor | None,
    highest: dict[str, int],
    images: Tensor,
    features: float,
) -> Tensor:
    """The relative square error of the logits, plus `features` times the mean one of the stages' outputs.

    Of a net that gives maps, the mean one of the stages' outputs alone.
    """
    ends = {f"stages.{s}.{len(stage) - 1}" for s, stage in enumerate(net.spec.stages)}
    exact = rounded = images
    errors: list[Tensor] = []
    for name, block in fused_blocks(net):
        with torch.no_grad():
            exact = after_conv(block, block.conv(exact))
        rounded = after_conv(block, _run(layers.get(name), block.conv, rounded, highest[name]))
        if name in ends:
            errors.append(_relative_error(rounded, exact))
    if pool is not None:
        rounded = _round_activations(rounded, pool, highest[POOL])
    if net.spec.maps:
        errors[-1] = _relative_error(rounded, exact)
        return torch.stack(errors).mean()
    exact, rounded = exact.mean((2, 3)), rounded.mean((2, 3))
    if net.has_classifier:
        rounded = _run(layers.get(CLASSIFIER), net.classifier, rounded, highest[CLASSIFIER])
        exact = net.classifier(exact)
    return _relative_error(rounded, exact) + features * torch.stack(errors).mean()


def _run(layer: _Learnable | None, module: nn.Conv2d | nn.Linear, x: Tensor, highest: int) -> Tensor:
    return cast(Tensor, module(x)) if layer is None else layer.run(module, x, highest)


def _relative_error(values: Tensor, target: Tensor) -> Tensor:
    """The mean over the images of square error over energy; one with more than the median error adds no more than it.

    No weights make up for what is clipped, and in a plain mean the images with most of it decide.
    """
    target = target.detach()
    energy = target.flatten(1).square().sum(1)
    # Image by image, so that one with enormous activations does not count for all the others; and in units of the
    # median at least, so that one with hardly any does not either.
    energy = torch.maximum(energy, energy.median()).clamp_min(torch.finfo(target.dtype).tiny)
    error = (values - target).flatten(1).square().sum(1) / energy
    counts = weights_of_errors(error.detach())
    return (error * counts).sum() / counts.sum()
