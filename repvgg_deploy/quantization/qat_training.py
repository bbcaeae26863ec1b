"""One run of quantization-aware training by distillation: what a step does, and the state that it can continue from.

The student learns the float net's logits and the outputs of its stages, on new augmentations for every step, so that
unlabelled images suffice. A step depends only on its number and the seed: a stopped run continues bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repvgg_deploy.fusion.algebra import Affine, Convolved, Normalized, Scaled, Summed, norms_of
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.augmentation import blend, crop, recolour
from repvgg_deploy.quantization.grid import INT8
from repvgg_deploy.quantization.qat import QatBlock, QatLinear, quantizers

# Scales, BN weights and biases move by a share of what they are, kernels by a share of one integer step.
_SLOWER = 0.02
_WARM_UP = 10
# Draws of a step: far enough apart that no two seeds share one.
_STRIDE = 1_000_003


@dataclass(frozen=True)
class TrainingOptions:
    """How the student learns.

    Attributes:
        steps: of Adam.
        batch: images per step, over all processes.
        rate: of kernels, in steps of their integers, at the start; it falls to 0 by a cosine.
        features: weight of the stages' outputs relative to the logits.
        labels: weight of the cross-entropy with the labels; 0 takes none.
        seed: of all random numbers.
        mixed_precision: convolutions in bfloat16 while training.
    """

    steps: int
    batch: int = 64
    rate: float = 0.01
    features: float = 1.0
    labels: float = 0.0
    seed: int = 0
    mixed_precision: bool = False


Take = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Gives the normalized images (N, C, H, W) of some indices, and their classes where they have some."""


class _WithStages(nn.Module):
    """A RepVGG of any form that gives its logits and the output of every stage."""

    def __init__(self, net: RepVGG) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        for stage in self.net.stages:
            x = stage(x)
            outputs.append(x)
        return self.net.head(x), outputs


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run continues from.

    Attributes:
        done: steps.
        rates: of the groups of tensors at the start, which come from the initial scales.
        since: sums of what the steps returned since the last row of the curves, and how many steps these are.
        tensors: `student.NAME`, and the moments of Adam `optimizer.INDEX.NAME`.
    """

    done: int
    rates: tuple[float, ...]
    since: Mapping[str, float]
    tensors: Mapping[str, Tensor]


class QatTraining:
    """A student, its teacher and its optimizer, and the number of steps done.

    Under torchrun each process has one of these, takes its share of every batch, and the gradients are averaged; an
    image counts the same in a larger share as in a smaller one.
    """

    def __init__(self, student: nn.Module, teacher: RepVGG, options: TrainingOptions) -> None:
        self.options = options
        self.student = student.train()
        self.teacher = _WithStages(copy.deepcopy(teacher).eval().requires_grad_(False))
        self.optimizer = _optimizer(student, options.rate)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.done = 0
        self._since: dict[str, float] = {}
        wrapped: nn.Module = _WithStages(cast(RepVGG, student))
        if dist.is_initialized():
            # Running statistics that move are those of the first process, whose state is saved.
            wrapped = DistributedDataParallel(wrapped, broadcast_buffers=_statistics_move(student))
        self._runs = wrapped
        self._mean_share = options.batch / (dist.get_world_size() if dist.is_initialized() else 1)

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.teacher.net.classifier.weight.device

    def step(self, take: Take, count: int, limits: tuple[Tensor, Tensor]) -> dict[str, float]:
        """One step on augmentations of `count` images; the loss, and the percentage with the teacher's class.

        Args:
            take: see `Take`.
            count: of the images.
            limits: the smallest and the largest normalized value of each channel.
        """
        options = self.options
        self._set_rate()
        self._set_saturation()
        pictures, labels = self._draw(take, count, limits)
        autocast: Any = nullcontext()
        if options.mixed_precision:
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        with torch.no_grad(), autocast:
            wanted, stages = self.teacher(pictures)
        with autocast:
            logits, outputs = self._runs(pictures)
        loss = _distance(logits.float(), wanted.float())
        if options.features:
            distances = [_distance(a.float(), b.float()) for a, b in zip(outputs, stages, strict=True)]
            loss = loss + options.features * torch.stack(distances).mean()
        if labels is not None and options.labels:
            loss = loss + options.labels * F.cross_entropy(logits.float(), labels)
        loss = loss * (len(pictures) / self._mean_share)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.done += 1
        agreement = (logits.argmax(1) == wanted.argmax(1)).float().sum() / self._mean_share
        values = torch.stack([loss.detach(), agreement])
        if dist.is_initialized():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        taken = {"loss": float(values[0]), "agreement": 100 * float(values[1])}
        for name, value in {"steps": 1.0, **taken}.items():
            self._since[name] = self._since.get(name, 0.0) + value
        return taken

    def means(self) -> dict[str, float]:
        """The means of what the steps since the last call returned: one batch alone says little."""
        steps = self._since.pop("steps")
        means = {name: total / steps for name, total in self._since.items()}
        self._since = {}
        return means

    def state(self) -> TrainingState:
        """Everything that `restore` needs to continue."""
        tensors = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        return TrainingState(self.done, tuple(self._rates), dict(self._since), tensors)

    def known_tensors(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The tensors that every state of this run has, and those that one may have, by name, with other values."""
        parameters = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        moments: dict[str, Tensor] = {}
        for index, parameter in enumerate(parameters):
            moments[f"optimizer.{index}.step"] = torch.zeros(())
            moments |= {f"optimizer.{index}.{name}": parameter for name in ("exp_avg", "exp_avg_sq")}
        return {f"student.{name}": value for name, value in self.student.state_dict().items()}, moments

    def restore(self, state: TrainingState) -> None:
        """Continue from what `state` returned."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in state.tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = value
        self.student.load_state_dict(groups["student"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in groups.get("optimizer", {}).items():
            index, _, rest = name.partition(".")
            moments.setdefault(int(index), {})[rest] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self._rates = list(state.rates)
        self.done = state.done
        self._since = dict(state.since)

    def _set_rate(self) -> None:
        decay = 0.5 * (1 + math.cos(math.pi * self.done / self.options.steps)) * min(1.0, (self.done + 1) / _WARM_UP)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * decay

    def _set_saturation(self) -> None:
        """TensorRT and ONNX Runtime saturate at different integers, so the steps take turns."""
        turns = saturations(self.student)
        set_saturation(self.student, turns[self.done % len(turns)])

    def _draw(self, take: Take, count: int, limits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        options = self.options
        generator = torch.Generator().manual_seed(options.seed * _STRIDE + self.done)
        chosen = torch.randint(count, (options.batch,), generator=generator)
        images, labels = take(chosen)
        lowest, highest = limits
        pictures = recolour(crop(images, generator), generator) if images.shape[1] == 3 else crop(images, generator)
        pictures = torch.minimum(torch.maximum(pictures, lowest), highest)
        if not options.labels:
            # A blend has no single label; the teacher has an answer to it.
            pictures = blend(pictures, generator)
        # Drawn whole and then shared out, so that the number of processes changes nothing.
        share = slice(None)
        if dist.is_initialized():
            share = slice(dist.get_rank(), None, dist.get_world_size())
        pictures = pictures[share].to(self.device).contiguous(memory_format=torch.channels_last)
        return pictures, None if labels is None else labels[share].to(self.device)


def set_saturation(net: nn.Module, highest: int) -> None:
    """Let activations of 8 bits after a ReLU saturate at `highest`: 127 as in TensorRT, 255 as in ONNX Runtime."""
    for quantizer in quantizers(net):
        if quantizer.unsigned and quantizer.lowest == -128:
            quantizer.highest = highest


def _statistics_move(net: nn.Module) -> bool:
    return any(layer.options.moving_statistics for layer in net.modules() if isinstance(layer, QatBlock))


def saturations(net: nn.Module) -> tuple[int, ...]:
    """Where such activations saturate in the engines that `net` is trained for."""
    grids = (layer.options for layer in net.modules() if isinstance(layer, QatBlock))
    return next(grids, INT8).saturations


def _optimizer(student: nn.Module, rate: float) -> torch.optim.Adam:
    groups: list[dict[str, Any]] = []
    for layer in student.modules():
        if isinstance(layer, QatBlock):
            groups += _block_groups(layer, rate)
        elif isinstance(layer, QatLinear):
            groups.append({"params": [layer.linear.weight], "lr": rate * float(layer.weight_scale.detach().median())})
    taken = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in student.parameters() if id(p) not in taken]
    groups.append({"params": rest, "lr": rate * _SLOWER})
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def _block_groups(block: QatBlock, rate: float) -> list[dict[str, Any]]:
    """The kernels of a block's branches and its BN weights, with rates that move the integers alike in every branch."""
    scale = block.weight_scale.detach()
    groups = [
        {"params": [conv.weight], "lr": rate * float((scale / gain.abs().clamp_min(1e-12)).median())}
        for conv, gain in _kernels(block.parts.value, torch.ones_like(scale))
    ]
    norms = [cast(Any, n) for n in norms_of(block.parts.value) if isinstance(n.weight, nn.Parameter)]
    sizes = [float(norm.weight.detach().abs().mean()) for norm in norms]
    return groups + [{"params": [n.weight], "lr": rate * _SLOWER * s} for n, s in zip(norms, sizes, strict=True)]


def _kernels(value: Affine, gain: Tensor) -> Iterator[tuple[nn.Conv2d, Tensor]]:
    """Each convolution of a block, and what its output is multiplied by until the sum of the branches, per channel."""
    if isinstance(value, Convolved):
        yield value.conv, gain
    elif isinstance(value, Summed):
        for part in value.values:
            yield from _kernels(part, gain)
    elif isinstance(value, Scaled):
        yield from _kernels(value.value, gain * value.factor.detach().flatten())
    elif isinstance(value, Normalized):
        norm = cast(Any, value.norm)
        factor = (norm.running_var + getattr(norm, "eps", 0.0)).rsqrt()
        yield from _kernels(value.value, gain * (factor if norm.weight is None else factor * norm.weight.detach()))


def _distance(values: Tensor, target: Tensor) -> Tensor:
    """The mean over the images of e / (1 + e), e the square error over the energy: no image counts for many others."""
    error = (values - target).flatten(1).square().sum(1)
    ratio = error / target.flatten(1).square().sum(1).clamp_min(torch.finfo(target.dtype).tiny)
    return (ratio / (1 + ratio)).mean()
