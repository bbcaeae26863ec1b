"""Calibration images synthesized from a checkpoint: their BN statistics match those the net was trained with.

A net in training form holds the mean and the variance of each BN's input over its training images. Images are optimized
from smooth noise until a batch of them has the same at every BN. They look like textures, and they drive every channel
of the net as real images do, which is all that calibration needs.
Source: "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion" (https://arxiv.org/abs/1912.08795);
"ZeroQ: A Novel Zero Shot Quantization Framework" (https://arxiv.org/abs/2001.00281).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.cost import count_flops
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.quantization.recipe import PictureOptions
from repvgg_deploy.torch_precision import float32

# The start: noise on a grid of this many pixels per cell, enlarged; in shares of the range of pixel values.
_CELL, _SPREAD = 8, 0.2
# Random shifts, in shares of the size.
_SHIFT = 1 / 16
_WARM_UP = 5
# Sizes that are tried: a multiple of the net's total stride, as the images are that it was trained on.
_SMALLEST, _STEP = 64, 32


@dataclass(frozen=True)
class PictureSummary:
    """What was made, and how near it came.

    `distance` is the mean over the BNs of the squared distance of the batch's mean and deviation to the running ones,
    in units of the running deviation; `start_distance` that of the noise it began with. `steps` is less than what was
    requested if the time ran out.
    """

    pictures: int
    height: int
    width: int
    steps: int
    seed: int
    start_distance: float
    distance: float
    cut_short: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class MadePictures:
    """Normalized images (N, C, H, W), float32, to be iterated in batches, any number of times."""

    pictures: Tensor
    summary: PictureSummary
    batch: int = field(default=32, repr=False)

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.pictures), self.batch):
            yield self.pictures[start : start + self.batch]


def plan_pictures(net: RepVGG, preprocessing: Preprocessing, options: PictureOptions) -> tuple[int, int, int]:
    """Count, height and width of the images to synthesize for `net`: as large as its own, or as the budget allows.

    The net is convolutional, and the statistics are means over pixels: so smaller images have the same. Below 64
    pixels the padding would count too much; there the images become fewer. The plan depends on the architecture
    alone, not on how fast the machine is.
    """
    shortest = min(preprocessing.height, preprocessing.width)
    scales = [1.0] + [s / shortest for s in range(shortest // _STEP * _STEP, _SMALLEST - 1, -_STEP) if s < shortest]
    for scale in scales:
        height, width = (round(side * scale) for side in (preprocessing.height, preprocessing.width))
        # Forward, and backward to the images; the weights need no gradient.
        each = 2 * options.steps * count_flops(net.spec, height, width)
        affordable = int(options.multiply_adds * 1e12 / each)
        if affordable >= options.count / 2:
            return min(options.count, affordable), height, width
    return min(options.count, max(32, affordable)), height, width


@torch.inference_mode(False)
@torch.enable_grad()
@float32(deterministic=True)
def make_pictures(
    net: RepVGG,
    preprocessing: Preprocessing,
    options: PictureOptions | None = None,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress = SILENT,
) -> MadePictures:
    """Images on which the inputs of every BN of `net` have their running mean and deviation.

    The same net, options and number of threads give the same images, unless `seconds` cut them short.

    Args:
        net: in training form, on any device; it is not changed.
        preprocessing: of the images that the net takes; the result has their range, and their size or less.
        options: see `PictureOptions`.
        seed: of all random numbers.
        seconds: the time to take. Where the first steps show that it is too short, fewer are taken; None for no limit.
        progress: receives the step `synthesizing images`, in steps of Adam.

    Raises:
        DeployError: `net` has no BN with running statistics: it is in deploy form.
    """
    options = options or PictureOptions()
    # In evaluation every BN normalizes by the running statistics, not by those of these images.
    net = copy.deepcopy(net).eval().requires_grad_(False)
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    if not norms:
        raise DeployError(
            "the checkpoint is in deploy form: it has no BN statistics from which to synthesize calibration images",
            "give --calib DIR, a folder of a few hundred typical images, or the checkpoint in training form",
        )
    count, height, width = plan_pictures(net, preprocessing, options)
    batches = [min(options.batch, count - start) for start in range(0, count, options.batch)]
    clock = _Clock(seconds, len(batches) * options.steps, options.steps, progress)
    made: list[_Batch] = []
    with _observe(norms) as distances:
        maker = _BatchMaker(net, distances, _range(preprocessing, next(net.parameters())), options)
        for index, size in enumerate(batches):
            shape = (size, net.spec.in_channels, height, width)
            # A generator per batch: its draws do not depend on how many steps the batches before it had time for.
            made.append(maker.make(shape, torch.Generator().manual_seed(seed * 1000 + index), clock))
    summary = PictureSummary(
        pictures=count,
        height=height,
        width=width,
        steps=min(batch.steps for batch in made),
        seed=seed,
        start_distance=round(sum(batch.start for batch in made) / len(made), 4),
        distance=round(sum(batch.distance for batch in made) / len(made), 4),
        cut_short=any(batch.steps < options.steps for batch in made),
    )
    return MadePictures(torch.cat([batch.pictures for batch in made]), summary)


@dataclass(frozen=True)
class _Batch:
    pictures: Tensor
    steps: int
    start: float
    distance: float


class _Clock:
    """Counts steps, and estimates from the first few how many fit into the time."""

    def __init__(self, seconds: float | None, total: int, each: int, progress: Progress) -> None:
        self.seconds, self.total, self.each, self.progress = seconds, total, each, progress
        self.begin = time.perf_counter()
        self.done = 0

    def count_step(self, begun: int) -> int:
        """One more step is done, which is number `begun` of its batch; the steps that this batch should take."""
        self.done += 1
        steps = self._steps_in_time(begun)
        self.progress.step("synthesizing images", self.done, self.total)
        return steps

    def _steps_in_time(self, begun: int) -> int:
        if self.seconds is None or self.done < _WARM_UP:
            return self.each
        spent = time.perf_counter() - self.begin
        possible = int((self.seconds - spent) / (spent / self.done))
        rest = self.total - self.done
        return self.each if possible >= rest else max(begun, begun + possible * (self.each - begun) // rest)


class _BatchMaker:
    """Optimizes one batch of images; `distances` are what the BNs of `net` see in its last run."""

    def __init__(
        self, net: RepVGG, distances: list[Tensor], limits: tuple[Tensor, Tensor], options: PictureOptions
    ) -> None:
        self.net, self.distances, self.limits, self.options = net, distances, limits, options

    def make(self, shape: tuple[int, int, int, int], generator: torch.Generator, clock: _Clock) -> _Batch:
        lowest, highest = self.limits
        pictures = self._smooth_noise(shape, generator).requires_grad_()
        optimizer = torch.optim.Adam([pictures], lr=self.options.rate)
        start = 0.0
        step, steps = 0, self.options.steps
        while step < steps:
            optimizer.param_groups[0]["lr"] = self.options.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            distance = self._distance(_shift(pictures, generator))
            start = float(distance.detach()) if step == 0 else start
            (pictures.grad,) = torch.autograd.grad(distance, pictures)
            optimizer.step()
            with torch.no_grad():
                pictures.copy_(torch.minimum(torch.maximum(pictures, lowest), highest))
            step += 1
            steps = clock.count_step(step)
        with torch.no_grad():
            final = float(self._distance(pictures))
        return _Batch(pictures.detach().cpu().contiguous(), step, start, final)

    def _distance(self, pictures: Tensor) -> Tensor:
        self.distances.clear()
        self.net(pictures.contiguous(memory_format=torch.channels_last))
        return torch.stack(self.distances).mean()

    def _smooth_noise(self, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        lowest, highest = self.limits
        count, channels, height, width = shape
        cells = [max(2, -(-side // _CELL)) for side in (height, width)]
        noise = torch.randn(count, channels, *cells, generator=generator)
        noise = F.interpolate(noise, (height, width), mode="bicubic", align_corners=False).to(lowest.device)
        middle, reach = (lowest + highest) / 2, highest - lowest
        return torch.minimum(torch.maximum(middle + _SPREAD * reach * noise, lowest), highest)


def _range(preprocessing: Preprocessing, like: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest normalized value of each channel (1, C, 1, 1)."""
    mean, std = (
        torch.tensor(values, dtype=like.dtype, device=like.device)[None, :, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    return -mean / std, (1 - mean) / std


def _shift(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The images moved by a few pixels, round the border, so that none fits the places of a stride."""
    reach = [max(1, round(side * _SHIFT)) for side in pictures.shape[2:]]
    down, right = (int(torch.randint(-most, most + 1, (), generator=generator)) for most in reach)
    return pictures.roll((down, right), (2, 3))


@contextmanager
def _observe(norms: list[_BatchNorm]) -> Iterator[list[Tensor]]:
    """A list that a run of the net fills with the distance at each of `norms`."""
    distances: list[Tensor] = []

    def add(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        distances.append(_distance_at(norm, inputs[0]))  # type: ignore[arg-type]

    handles = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        yield distances
    finally:
        for handle in handles:
            handle.remove()


def _distance_at(norm: _BatchNorm, x: Tensor) -> Tensor:
    """The mean over the channels of the squared distance of mean and deviation, in units of the running deviation."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # From the running mean, so that nothing cancels; torch.var_mean takes six times as long.
    rows = x.permute(0, 2, 3, 1).flatten(0, 2) - norm.running_mean
    mean = rows.mean(0)
    variance = (rows.square().mean(0) - mean.square()).clamp_min(0)
    wanted = (norm.running_var + norm.eps).sqrt()
    deviation = (variance + norm.eps).sqrt()
    return ((mean / wanted).square() + (deviation / wanted - 1).square()).mean()
