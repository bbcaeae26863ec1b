"""Quantization-aware training on the equivalent kernel: what is rounded is the one kernel that is deployed.

Each forward derives the equivalent 3×3 kernel of all branches, differentiably, rounds it with one scale per filter and
runs one convolution. The branches are trained; none of them is ever rounded by itself, which would constrain something
that no engine computes. Rounding passes gradients through, and the scales are learned.
Sources: "Learned Step Size Quantization" (https://arxiv.org/abs/1902.08153); that the constraint belongs on the
equivalent kernel: RepVGG's authors (https://github.com/DingXiaoH/RepVGG).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.algebra import Affine, Convolved, Input, Normalized, Scaled, kernel_and_bias
from repvgg_deploy.fusion.blocks import BlockParts
from repvgg_deploy.fusion.fuse import find_blocks
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.grid import INT8, Grid
from repvgg_deploy.quantization.pair_sums import LEVELS, count_taps, round_in_pairs
from repvgg_deploy.quantization.points import CLASSIFIER, POOL, geometry, per_channel


@dataclass(frozen=True)
class QatOptions(Grid):
    """What a net is trained for: the integers of a `Grid`, and how its BNs behave.

    Attributes:
        weight_bits: of weights, 2 to 8. An INT8 graph has 8.
        activation_bits: of activations, 2 to 8.
        per_tensor: one scale for all filters of a layer, instead of one per filter.
        full_range: activations after a ReLU up to 255: finer, for ONNX Runtime and OpenVINO, not for TensorRT.
        moving_statistics: the running statistics of the BNs follow the quantized activations; by default they stay.
    """

    moving_statistics: bool = False


@dataclass(frozen=True)
class LayerScales:
    """The scales of one layer: `weight` (filters), float32, and that of its input."""

    weight: Tensor
    input: float


@dataclass(frozen=True)
class QatScales:
    """The scales of a net: its blocks and its classifier by name, and of the input of the global pool.

    For a module other than a RepVGG classifier, only the RepVGG blocks have scales, and `pool` is None. With
    `full_range` they are for activations up to 255, which TensorRT does not have.
    """

    layers: Mapping[str, LayerScales]
    pool: float | None = None
    full_range: bool = False


class _RoundWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, levels: int) -> Tensor:
        ratio = weight / per_channel(scale, weight)
        if levels == LEVELS:
            # No pair of neighbours may be too large for a CPU's kernel, as in every INT8 graph.
            rounded = round_in_pairs(ratio.flatten(1), count_taps(weight)).reshape(weight.shape)
        else:
            rounded = ratio.round().clamp_(-levels, levels)
        ctx.save_for_backward(ratio, rounded)
        ctx.levels = levels
        return rounded * per_channel(scale, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        ratio, rounded = ctx.saved_tensors
        (grad,) = grad_outputs
        inside = ratio.abs() <= ctx.levels
        of_scale = grad * torch.where(inside, rounded - ratio, rounded)
        return grad * inside, of_scale.flatten(1).sum(1), None


class _RoundActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
        ratio = x / scale
        rounded = ratio.round().clamp_(lowest, highest)
        ctx.save_for_backward(ratio, rounded)
        ctx.limits = lowest, highest
        return rounded * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ratio, rounded = ctx.saved_tensors
        lowest, highest = ctx.limits
        (grad,) = grad_outputs
        inside = (ratio >= lowest) & (ratio <= highest)
        return grad * inside, (grad * torch.where(inside, rounded - ratio, rounded)).sum(), None, None


def round_kernel(weight: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """`weight` (filters, …) as its integers times `scale` (filters) give it; differentiable in both."""
    return cast(Tensor, _RoundWeights.apply(weight, scale, 2 ** (bits - 1) - 1))  # type: ignore[no-untyped-call]


class FakeQuantizer(nn.Module):
    """Rounds activations with one learned scale; its logarithm is the parameter, so that it stays positive.

    `highest` is the integer at which it saturates. With 8 bits after a ReLU that is 127 in TensorRT and 255 in ONNX
    Runtime: whoever trains for both sets it in turn. With `full_range` it is 255.
    """

    def __init__(self, scale: float, grid: Grid = INT8, unsigned: bool = False) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float32))
        self.lowest = -(2 ** (grid.activation_bits - 1))
        self.unsigned = unsigned
        in_turn = unsigned and grid.activation_bits == 8
        self.highest = grid.saturations[0] if in_turn else grid.highest(unsigned)

    @property
    def scale(self) -> float:
        """The step between two integers."""
        return float(self.log_scale.detach().exp())

    def forward(self, x: Tensor) -> Tensor:
        """`x` as its integers times the scale give it."""
        scale = self.log_scale.exp()
        return cast(Tensor, _RoundActivations.apply(x, scale, self.lowest, self.highest))  # type: ignore[no-untyped-call]


class _QuantizedLayer(nn.Module):
    """What a quantized block and a quantized classifier share: the scales of weights and input."""

    def __init__(self, filters: int, scales: LayerScales, options: QatOptions, unsigned: bool) -> None:
        super().__init__()
        self.options = options
        self.input = FakeQuantizer(scales.input, options, unsigned)
        values = scales.weight.log() if not options.per_tensor else scales.weight.amax().log().reshape(1)
        self.log_weight_scale = nn.Parameter(values.detach().clone().float())
        self.filters = filters

    @property
    def weight_scale(self) -> Tensor:
        """The scale of each filter (filters)."""
        return self.log_weight_scale.exp().expand(self.filters)

    def round_bias(self, bias: Tensor) -> Tensor:
        """`bias` in whole units of the sums of products, as an integer convolution holds it."""
        unit = (self.weight_scale * self.input.log_scale.exp()).detach()
        return bias + ((bias / unit).round() * unit - bias).detach()

    def scales(self) -> LayerScales:
        """The values of the scales."""
        return LayerScales(self.weight_scale.detach().clone(), self.input.scale)


class QatBlock(_QuantizedLayer):
    """A RepVGG block in training form that computes what its deploy form does on integers.

    `block` is the block of whatever library, whose branches are trained, and `parts` are its parts. `output` rounds
    what follows the block, before a global pool.
    """

    def __init__(
        self, block: nn.Module, parts: BlockParts, scales: LayerScales, options: QatOptions, unsigned: bool = False
    ) -> None:
        super().__init__(parts.conv.out_channels, scales, options, unsigned)
        self.block = block
        self.parts = parts
        self.output: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for float `x`: the input is rounded, and the equivalent kernel."""
        parts = self.parts
        return cast(Tensor, self.output(parts.se_after(parts.act(parts.se_before(self.total(x))))))

    def total(self, x: Tensor) -> Tensor:
        """What the rounded equivalent kernel gives, before squeeze-excites and activation."""
        parts = self.parts
        x = self.input(x)
        if self.training and self.options.moving_statistics:
            _follow_statistics(parts.value, x.detach())
        kernel, bias = kernel_and_bias(parts.value, torch.float32)
        kernel = round_kernel(kernel, self.weight_scale, self.options.weight_bits)
        return F.conv2d(x, kernel, self.round_bias(bias), **geometry(parts.conv))


class QatLinear(_QuantizedLayer):
    """A linear layer with rounded weights and input."""

    def __init__(self, linear: nn.Linear, scales: LayerScales, options: QatOptions, unsigned: bool = False) -> None:
        super().__init__(linear.out_features, scales, options, unsigned)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for float `x`."""
        weight = round_kernel(self.linear.weight, self.weight_scale, self.options.weight_bits)
        return F.linear(self.input(x), weight, self.round_bias(self.linear.bias))


@torch.no_grad()
def _follow_statistics(value: Affine, x: Tensor) -> Tensor:
    """Move the running statistics of every BN towards those of this batch, as training does; the value for `x`."""
    if isinstance(value, Input):
        return x
    if isinstance(value, Convolved):
        return cast(Tensor, value.conv(x))
    if isinstance(value, Scaled):
        return _follow_statistics(value.value, x) * value.factor.reshape(-1, 1, 1)
    if isinstance(value, Normalized):
        y, norm = _follow_statistics(value.value, x), cast(Any, value.norm)
        momentum = getattr(norm, "momentum", None)
        if momentum is None:
            # A frozen BN stays as it is.
            return cast(Tensor, norm(y))
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, momentum, norm.eps)
    return torch.stack([_follow_statistics(part, x) for part in value.values]).sum(0)


def prepare_qat(model: nn.Module, scales: QatScales, options: QatOptions | None = None) -> nn.Module:
    """A copy of `model` whose RepVGG blocks compute what their deploy form does on integers; for any training loop.

    Of a RepVGG classifier the classifier and the input of the global pool are rounded as well, as in an INT8 graph; of
    any other module the rest stays float. `convert_qat` turns it back.

    Args:
        model: a module with RepVGG blocks in training form, of any library; it is not changed.
        scales: of each block by its name in `model`; see `observe_scales`.
        options: see `QatOptions`.

    Raises:
        DeployError: there is no RepVGG block in training form, one has no scales or those of another width, or one is
            not of float32.

    Example:
        >>> from repvgg_deploy import build, load_checkpoint, prepare_qat
        >>> from repvgg_deploy.quantization.qat_scales import observe_scales
        >>> net = build(load_checkpoint("net.pth"))
        >>> scales = observe_scales(net, [torch.rand(2, 3, 64, 64)])
        >>> prepared = prepare_qat(net, scales)
        >>> type(prepared.stages[1][0]).__name__
        'QatBlock'
    """
    options = options or QatOptions()
    net = copy.deepcopy(model).requires_grad_(True)
    blocks = find_blocks(net)
    for name in qat_layers(net):
        part = net.get_submodule(name)
        filters = part.out_features if isinstance(part, nn.Linear) else blocks[name][1].conv.out_channels
        _require_scales(name, part, filters, scales)
    unsigned = unsigned_inputs(net)
    last: QatBlock | None = None
    for name, (block, parts) in blocks.items():
        last = QatBlock(block, parts, scales.layers[name], options, unsigned[name])
        _replace(net, name, last)
    if isinstance(net, RepVGG) and last is not None:
        layer: Any = QatLinear(net.classifier, scales.layers[CLASSIFIER], options, unsigned[CLASSIFIER])
        net.classifier = layer
        if scales.pool is not None:
            last.output = FakeQuantizer(scales.pool, options, unsigned[POOL])
    return net


def _require_scales(name: str, layer: nn.Module, filters: int, scales: QatScales) -> None:
    hint = "observe_scales() gives those of every block"
    if any(parameter.dtype != torch.float32 for parameter in layer.parameters()):
        raise DeployError(
            f"{name} is not of float32, in which scales are learned", "model.float(); and autocast to train"
        )
    found = scales.layers.get(name)
    if found is None:
        raise DeployError(f"there are no scales for {name}", hint)
    if found.weight.shape != (filters,):
        raise DeployError(f"the scales for {name} are of {len(found.weight)} filters, but it has {filters}", hint)
    values = torch.cat([found.weight.flatten().cpu(), torch.tensor([found.input])])
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise DeployError(f"the scales for {name} are not all positive numbers", hint)


def unsigned_inputs(net: nn.Module) -> dict[str, bool]:
    """Which of the inputs that are rounded are known never to be negative, by the name of their layer or `POOL`."""
    # Of a chain of blocks each input but the first is after the ReLU of the block before. In what order the blocks of
    # any other module run, nobody has said.
    chained = isinstance(net, RepVGG)
    known: dict[str, bool] = {}
    behind_relu = False
    for name, (_, parts) in find_blocks(net).items():
        known[name] = behind_relu
        behind_relu = chained and isinstance(parts.act, nn.ReLU)
    return {**known, CLASSIFIER: behind_relu, POOL: behind_relu} if chained else known


def convert_qat(model: nn.Module) -> tuple[nn.Module, QatScales]:
    """A copy of what `prepare_qat` gave, with its blocks in training form again, and the scales that were learned.

    `fuse` turns it into the deploy form, whose kernels divided by the scales are the integers that were trained for.

    Raises:
        DeployError: `model` has no block of `prepare_qat`.

    Example:
        >>> from repvgg_deploy import build, convert_qat, load_checkpoint, prepare_qat
        >>> from repvgg_deploy.quantization.qat_scales import observe_scales
        >>> net = build(load_checkpoint("net.pth"))
        >>> prepared = prepare_qat(net, observe_scales(net, [torch.rand(2, 3, 64, 64)]))
        >>> trained, scales = convert_qat(prepared)
        >>> type(trained).__name__, len(scales.layers["stages.1.0"].weight)
        ('RepVGG', 32)
    """
    net = copy.deepcopy(model)
    found = {name: m for name, m in net.named_modules() if isinstance(m, QatBlock | QatLinear)}
    if not found:
        raise DeployError(f"{type(model).__name__} has no block to convert", "give what prepare_qat() returned")
    outputs = (m.output for m in found.values() if isinstance(m, QatBlock))
    pool = next((output.scale for output in outputs if isinstance(output, FakeQuantizer)), None)
    for name, layer in found.items():
        _replace(net, name, layer.block if isinstance(layer, QatBlock) else layer.linear)
    full_range = any(layer.options.full_range and layer.input.unsigned for layer in found.values())
    layers = {name: layer.scales() for name, layer in found.items()}
    return net.requires_grad_(False).eval(), QatScales(layers, pool, full_range)


def qat_layers(net: nn.Module) -> list[str]:
    """The names of the RepVGG blocks in training form, in order, and of a RepVGG's classifier.

    Raises:
        DeployError: there is no such block, or `net` itself is one.
    """
    names = list(find_blocks(net))
    if "" in names:
        raise DeployError(f"{type(net).__name__} is itself a block, which has no name", "put it into an nn.Sequential")
    if not names:
        raise DeployError(f"{type(net).__name__} has no RepVGG block in training form", "training needs its branches")
    return [*names, CLASSIFIER] if isinstance(net, RepVGG) else names


def quantizers(net: nn.Module) -> Iterable[FakeQuantizer]:
    """All quantizers of activations of a prepared net."""
    return (module for module in net.modules() if isinstance(module, FakeQuantizer))


def _replace(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    net.get_submodule(parent)._modules[child] = module
