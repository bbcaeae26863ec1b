"""Calibration statistics: what flows through each quantization point of a fused net, from a stream of images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.typed_values import Sha256
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.progress import SILENT, Progress, count_steps
from repvgg_deploy.quantization.array_files import ArrayFile, save_arrays
from repvgg_deploy.quantization.augmentation import MOST_AUGMENTATIONS, AugmentedImages
from repvgg_deploy.quantization.points import Images, point_channels, point_names, rebatch, walk
from repvgg_deploy.torch_precision import float32

# The seven strongest images that `usual` may leave out, and the next one.
_PEAKS = 8
_ANOTHER = "name another --calib-cache file, or delete this one"
_PER_CHANNEL = ("lowest", "highest", "mean", "mean_square", "usual")


@dataclass(frozen=True)
class PointStatistics:
    """One point. Per channel (C): `lowest` and `highest` value, `mean` and `mean_square`.

    `usual` (C) is the largest absolute value without the one image in 128 (at most 7) that reaches highest: a single
    image can drive a net to activations a hundred times those of all others.
    """

    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]
    mean: NDArray[np.float64]
    mean_square: NDArray[np.float64]
    usual: NDArray[np.float64]

    @property
    def largest(self) -> NDArray[np.float64]:
        """Per channel (C) the largest absolute value."""
        return np.maximum(np.abs(self.lowest), np.abs(self.highest))


@dataclass(frozen=True)
class _About:
    """What a file says of its statistics."""

    images: Annotated[int, Meta(ge=1, le=1 << 32)]
    augmentations: Annotated[int, Meta(ge=1, le=MOST_AUGMENTATIONS)]
    sha256: Sha256
    images_sha256: Sha256


@dataclass(frozen=True)
class CalibrationStatistics:
    """The statistics of every point, and what they were taken from: a checkpoint's sha256 and the images' own.

    `images` are those that were given, each taken in `augmentations` variants.
    """

    points: Mapping[str, PointStatistics]
    images: int
    augmentations: int
    sha256: str
    images_sha256: str

    def save(self, path: Path) -> None:
        """Write everything to an `.npz` file at `path`."""
        arrays = {f"{name}/{key}": getattr(point, key) for name, point in self.points.items() for key in _PER_CHANNEL}
        about = {key: getattr(self, key) for key in ("images", "augmentations", "sha256", "images_sha256")}
        save_arrays(path, about, arrays)

    @classmethod
    def load(cls, path: Path, net: RepVGG, sha256: str, images: Images) -> CalibrationStatistics:
        """Read what `save` wrote for the fused `net`, made of the checkpoint with this sha256, and for these images.

        Raises:
            DeployError: `path` is not a calibration cache, is damaged, or belongs to another checkpoint or to other
                images.
        """
        name = f"the calibration cache {path}"
        file = ArrayFile(path, name, "delete it to calibrate anew")
        about = file.about(_About)
        if about.sha256 != sha256:
            raise DeployError(f"{name} belongs to another checkpoint (sha256 {about.sha256[:12]}…)", _ANOTHER)
        points = {point: _read_point(file, point, channels) for point, channels in point_channels(net).items()}
        digest = hashlib.sha256()
        for batch in rebatch(AugmentedImages(images, about.augmentations), torch.device("cpu")):
            _add_to(digest, batch)
        if digest.hexdigest() != about.images_sha256:
            raise DeployError(f"{name} belongs to other images, or to the same ones prepared in another way", _ANOTHER)
        return cls(points, about.images, about.augmentations, about.sha256, about.images_sha256)


def check_cache(path: Path, augmentations: int) -> None:
    """Check what can be checked of a calibration cache before anything else is known; without a file nothing is.

    Raises:
        DeployError: it is damaged, or its images were taken in another number of variants than `augmentations`.
    """
    if not path.exists():
        return
    name = f"the calibration cache {path}"
    file = ArrayFile(path, name, "delete it to calibrate anew")
    if file.kind is not None:
        # Not statistics, but the scales that training has learned.
        return
    about = file.about(_About)
    if about.augmentations != augmentations:
        raise DeployError(
            f"{name} is of {about.augmentations} augmentations of each image, but the recipe takes {augmentations}",
            _ANOTHER,
        )


def _add_to(digest: hashlib._Hash, batch: Tensor) -> None:
    # Channels first on the CPU, however the batch lies in memory: one digest on every device.
    digest.update(batch.cpu().contiguous().numpy().tobytes())


def _read_point(file: ArrayFile, name: str, channels: int) -> PointStatistics:
    values = {key: file.numbers(f"{name}/{key}", (channels,)).double().numpy() for key in _PER_CHANNEL}
    point = PointStatistics(**values)
    # Whatever the values are: a mean square and a largest absolute value are not negative.
    if (point.lowest > point.highest).any() or min(point.mean_square.min(), point.usual.min()) < 0:
        raise DeployError(f"{file.name}: the values of {name} contradict one another", file.hint)
    return point


class PointObserver:
    """Takes one image after another; the result does not depend on how they were batched."""

    def __init__(self) -> None:
        self.images = 0
        self.lowest: Tensor | None = None
        self.highest: Tensor
        self.sum: Tensor
        self.square: Tensor
        self.peaks: Tensor

    def add(self, x: Tensor) -> bool:
        """Take the values of some images (N, C, …); False, and nothing taken, where one is not finite."""
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        lowest, highest = flat.amin((0, 2)), flat.amax((0, 2))
        largest = float(torch.maximum(lowest.abs(), highest.abs()).max())
        if not math.isfinite(largest):
            return False
        mean, square = flat.double().mean(2).sum(0), (flat * flat).double().mean(2).sum(0)
        peaks = flat.abs().amax(2)
        if self.lowest is None:
            self.lowest, self.highest, self.sum, self.square = lowest, highest, mean, square
        else:
            self.lowest, self.highest = torch.minimum(self.lowest, lowest), torch.maximum(self.highest, highest)
            self.sum, self.square = self.sum + mean, self.square + square
            peaks = torch.cat([self.peaks, peaks])
        # The highest few images of each channel are all that is kept.
        self.peaks = peaks.topk(min(len(peaks), _PEAKS), dim=0).values
        self.images += len(x)
        return True

    def result(self) -> PointStatistics:
        """The statistics of all that was taken."""
        assert self.lowest is not None
        peaks = self.peaks[min(self.images // 128, _PEAKS - 1)]
        values = (self.lowest, self.highest, self.sum / self.images, self.square / self.images, peaks)
        return PointStatistics(*(value.double().cpu().numpy() for value in values))


@float32(deterministic=True)
@torch.no_grad()
def collect_statistics(
    net: RepVGG,
    images: Images,
    sha256: str = "",
    augmentations: int = 1,
    progress: Progress = SILENT,
    count: int = 0,
) -> CalibrationStatistics:
    """The statistics of a fused `net` on all `images`; memory does not grow with their number.

    Args:
        net: fused, on any device.
        images: batches of normalized images (N, C, H, W).
        sha256: of the checkpoint; a saved result is refused for any other.
        augmentations: how often each image is taken; see `AugmentedImages`.
        progress: receives the step `calibrating`, in images, each augmentation counted.
        count: of the images, for `progress`; 0 where it is not known.

    Raises:
        DeployError: there is no image, or a value somewhere is not finite.
    """
    observers = {name: PointObserver() for name in point_names(net)}
    seen = count_steps(progress, "calibrating", augmentations * count)
    digest = hashlib.sha256()
    device = net.device
    for batch in rebatch(AugmentedImages(images, augmentations), device):
        _add_to(digest, batch)
        for name, x in walk(net, batch):
            if not observers[name].add(x):
                raise DeployError(
                    f"the activations before {name} are not finite", "look at the images, and at the checkpoint"
                )
        seen(len(batch))
    taken = next(iter(observers.values())).images
    if taken == 0:
        raise DeployError("there are no calibration images", "give a folder of typical input images: --calib")
    points = {name: observer.result() for name, observer in observers.items()}
    return CalibrationStatistics(points, taken // augmentations, augmentations, sha256, digest.hexdigest())
