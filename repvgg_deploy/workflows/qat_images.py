"""The images of quantization-aware training, taken by index: kept in memory where they fit, decoded anew elsewhere."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.checkpoints import Checkpoint
from repvgg_deploy.errors import ImageError
from repvgg_deploy.images.decoding import Pixels, normalize, read_pixels
from repvgg_deploy.images.labelled import list_labelled_images
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.images.sources import ImageSource, Unreadable, list_images
from repvgg_deploy.quantization.data_free import MadePictures
from repvgg_deploy.workflows.evaluate import map_classes

# Decoded pixels are kept in memory up to this many bytes.
_KEPT_BYTES = 1 << 31
_THREADS = 4


# One image in so many is held out, of all that there are; and at most, which measure well enough.
_HELD_OUT_SHARE = 8
_MOST_HELD_OUT = 128


@dataclass(frozen=True)
class TrainingImages:
    """Images by index; `labels` are their classes, as the net counts them, or None.

    `left_out` says of what cannot be read why. Where the images are not kept in memory, a broken one is found when it
    is taken: it goes into `broken`, and the next one takes its place.
    """

    paths: tuple[ImageSource, ...]
    preprocessing: Preprocessing
    labels: NDArray[np.int64] | None = None
    kept: Pixels | None = None
    made: Tensor | None = None
    left_out: tuple[str, ...] = ()
    broken: BrokenImages = field(default_factory=BrokenImages)
    _untold: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def names_sha256(self) -> str:
        """The sha256 of the images' names, in their order; of none if they were synthesized."""
        return hashlib.sha256("\n".join(map(str, self.paths)).encode("utf-8", "surrogateescape")).hexdigest()

    def newly_broken(self) -> tuple[str, ...]:
        """Why images could not be read that were found to be broken since the last call."""
        found = tuple(self._untold)
        self._untold.clear()
        return found

    def __len__(self) -> int:
        return len(self.paths) if self.made is None else len(self.made)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The normalized images (N, C, H, W) of these indices, and their classes."""
        if self.made is not None:
            return self.made[indices], None
        pixels, taken = self._pixels(indices.tolist())
        labels = None if self.labels is None else torch.from_numpy(self.labels[taken])
        return torch.from_numpy(normalize(pixels, self.preprocessing)), labels

    def _pixels(self, indices: list[int]) -> tuple[Pixels, list[int]]:
        """The pixels of these images, and which they are."""
        if self.kept is not None:
            return self.kept[indices], indices
        with ThreadPoolExecutor(_THREADS) as pool:
            pixels, taken = zip(*pool.map(self._read, indices), strict=True)
        return np.stack(pixels), list(taken)

    def _read(self, index: int) -> tuple[Pixels, int]:
        """An image, or the next one that can be read: the same on every run."""
        for number in (*range(index, len(self.paths)), *range(index)):
            source = self.paths[number]
            if source in self.broken.reasons:
                continue
            try:
                return read_pixels(source, self.preprocessing), number
            except ImageError as error:
                if self.broken.reasons.setdefault(source, error.message) is error.message:
                    self._untold.append(error.message)
        raise ImageError(f"none of the images can be read: {next(iter(self.broken.reasons.values()))}", "give others")


@dataclass(frozen=True)
class KnownClasses:
    """The classes of a net: how many, and their names in the order of its outputs, where they are known."""

    count: int
    names: tuple[str, ...] | None = None


def known_classes(checkpoint: Checkpoint) -> KnownClasses:
    """The classes of the net in a checkpoint."""
    return KnownClasses(checkpoint.spec.classes, checkpoint.class_names)


def read_training_images(
    folder: Path, preprocessing: Preprocessing, most: int | None, classes: KnownClasses | None
) -> TrainingImages:
    """The images of `folder`, or `most` evenly spaced ones, without the broken ones.

    With `classes` they have labels, which are found as `evaluate` finds them.

    Raises:
        ImageError: there is no image, or, with `classes`, no folder per class, or images are not what the net takes.
        DeployError: the folders cannot be these classes.
    """
    if len(preprocessing.mean) not in (1, 3):
        raise ImageError(
            f"images have 3 channels, but the net takes {len(preprocessing.mean)}",
            "--data none and --calib none; or prepare_qat(), in a loop of your own",
        )
    labels: NDArray[np.int64] | None = None
    paths: tuple[ImageSource, ...]
    if classes is not None:
        found = list_labelled_images(folder)
        paths, closed = found.paths, found.unreadable
        if paths:
            labels = map_classes(found, classes.names, classes.count)[list(found.labels)]
    else:
        listed = list_images(folder)
        closed = tuple(path for path in listed if isinstance(path, Unreadable))
        paths = tuple(path for path in listed if not isinstance(path, Unreadable))
    left_out = tuple(f"{path} cannot be read ({path.reason})" for path in closed)
    if not paths:
        raise ImageError(f"none of the images of {folder} can be read: {left_out[0]}", "give another folder")
    if most is not None and len(paths) > most:
        chosen = np.linspace(0, len(paths), most, endpoint=False).astype(np.int64)
        paths = tuple(paths[i] for i in chosen)
        labels = None if labels is None else labels[chosen]
    images = TrainingImages(paths, preprocessing, labels, left_out=left_out)
    if len(paths) * preprocessing.height * preprocessing.width * 3 > _KEPT_BYTES:
        return images
    broken = BrokenImages()
    batches = list(read_batches(paths, preprocessing, 256, broken))
    if not batches:
        reason = next(iter(broken.reasons.values()), "there are none")
        raise ImageError(f"none of the images of {folder} can be read: {reason}", "give another folder")
    indices = [index for _, batch in batches for index in batch]
    return TrainingImages(
        tuple(paths[i] for i in indices),
        preprocessing,
        None if labels is None else labels[indices],
        np.concatenate([pixels for pixels, _ in batches]),
        left_out=(*left_out, *broken.reasons.values()),
    )


@dataclass(frozen=True)
class ImageSplit:
    """The images to train on, by index, and those that are held out of the training, normalized (N, C, H, W).

    `held_out_labels` are the classes (N) of these, or None.
    """

    images: TrainingImages
    trained: Tensor
    held_out: Tensor
    held_out_labels: Tensor | None

    def __len__(self) -> int:
        return len(self.trained)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The normalized images to train on with these indices, and their classes."""
        return self.images.take(self.trained[indices])


def hold_out(images: TrainingImages) -> ImageSplit:
    """Hold an eighth of the images out, evenly spaced and at most 128; all of fewer than 128 serve both purposes."""
    everything = torch.arange(len(images))
    chosen = everything
    if len(images) >= _MOST_HELD_OUT:
        count = min(_MOST_HELD_OUT, len(images) // _HELD_OUT_SHARE)
        chosen = torch.arange(count) * len(images) // count
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[chosen] = len(chosen) == len(images)
    return ImageSplit(images, everything[rest], *images.take(chosen))


def made_images(made: MadePictures, preprocessing: Preprocessing) -> TrainingImages:
    """Images synthesized from BN statistics as if they were prepared like this, to train on."""
    return TrainingImages((), preprocessing, made=made.pictures)


def image_limits(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """The smallest and the largest normalized value of each channel (C, 1, 1)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return -mean / std, (1 - mean) / std
