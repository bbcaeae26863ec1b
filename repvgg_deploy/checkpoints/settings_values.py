"""Single settings out of a configuration, whatever it calls them: each is checked before it is believed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from repvgg_deploy.artifacts import Interpolation, PreprocessingOptions
from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.activations import parse_activation

Found = TypeVar("Found")

_MAX_DEPTH = 8
_MAX_DICTS = 2000
_LARGEST = 8192
_LARGEST_SLOPE = 1e6
# What trainers keep beside a net's settings, large and of no interest here.
_PASSED_OVER = re.compile(r"optim|scheduler|schedule|callback|hook|loop|message_hub|logger|history", re.IGNORECASE)
_NOT_OF_BLOCKS = frozenset({"softmax", "logsoftmax", "sigmoid", "identity", "linear", "none", "auto"})
# Pillow's numbers of its filters, as torchvision and transformers write them.
_FILTERS: dict[Any, Interpolation] = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic",
    "nearest": "nearest", "lanczos": "lanczos", "bilinear": "bilinear", "bicubic": "bicubic",
}  # fmt: skip


def plain_name(name: str) -> str:
    """A key without case and punctuation: `imgsize` of `IMG_SIZE`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def walk_dicts(tree: Any) -> Iterator[Mapping[str, Any]]:
    """All dicts of a configuration, the outer ones first, as far as a configuration reaches."""
    level: list[Any] = [tree]
    left = _MAX_DICTS
    for _ in range(_MAX_DEPTH):
        following: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                left -= 1
                if left < 0:
                    return
                yield item
                following += [value for key, value in item.items() if not _PASSED_OVER.search(str(key))]
            elif isinstance(item, list | tuple):
                following += list(item)[:64]
        level = [item for item in following if isinstance(item, Mapping | list | tuple)]


def find_value(
    dicts: Sequence[Mapping[str, Any]], names: tuple[str, ...], convert: Callable[[Any], Found | None]
) -> Found | None:
    """The first value that `convert` takes, under the first of `names` (see `plain_name`); None: there is none."""
    for name in names:
        for item in dicts:
            for key, value in item.items():
                if value is not None and plain_name(str(key)) == name:
                    found = convert(value)
                    if found is not None:
                        return found
    return None


def as_strides(value: Any) -> tuple[int, ...] | None:
    """Strides of stages: whole numbers from 1 to 4, several of them."""
    if not isinstance(value, list | tuple) or not 3 <= len(value) <= 16:
        return None
    if not all(isinstance(item, int) and not isinstance(item, bool) and 1 <= item <= 4 for item in value):
        return None
    return tuple(value)


def as_activation(value: Any) -> str | None:
    """The name of an activation, of `SiLU`, `torch.nn.SiLU` or `dict(type="LeakyReLU", negative_slope=0.1)`.

    An unknown name is returned as it is; a function that is only used after a classifier gives None.
    """
    slope = None
    if isinstance(value, Mapping):
        slope = as_number(value.get("negative_slope"), -_LARGEST_SLOPE, _LARGEST_SLOPE)
        value = value.get("type", value.get("name"))
    if not isinstance(value, str) or not value:
        return None
    name = value.rpartition(".")[2]
    try:
        known = parse_activation(name)
    except DeployError:
        return None if plain_name(name) in _NOT_OF_BLOCKS else name
    is_leaky = known.name == "leaky_relu"
    return f"leaky_relu:{slope:g}" if is_leaky and slope is not None else str(known)


def as_list(value: Any) -> list[Any] | None:
    """A list, or a tuple as one."""
    return list(value) if isinstance(value, list | tuple) else None


def as_number(value: Any, lowest: float, highest: float) -> float | None:
    """A finite number within the limits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        return None
    return float(value)


def as_size(value: Any) -> tuple[int, int] | None:
    """Height and width of `32`, `[32, 48]`, `[3, 32, 48]` or `{"height": 32, "width": 48}`."""
    if isinstance(value, Mapping):
        edges = [value.get("height"), value.get("width")]
        value = edges if None not in edges else value.get("shortest_edge")
    sides = [value] if isinstance(value, int) else list(value)[-2:] if isinstance(value, list | tuple) and value else []
    if not sides or not all(as_number(side, 1, _LARGEST) and isinstance(side, int) for side in sides):
        return None
    return int(sides[0]), int(sides[-1])


def as_interpolation(value: Any) -> Interpolation | None:
    """The filter of `bicubic`, `InterpolationMode.BICUBIC`, or Pillow's number of it."""
    if isinstance(value, str):
        value = value.rpartition(".")[2].lower()
    return _FILTERS.get(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def as_mean_and_std(mean: Any, std: Any, of_bytes: bool = False) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std per channel for pixels from 0 to 1; those for pixels to 255 (`of_bytes`, or plainly) are scaled."""
    values = []
    for numbers in (mean, std):
        if not isinstance(numbers, list | tuple) or not 1 <= len(numbers) <= 16:
            return None
        if not all(as_number(number, 0, 1e4) is not None for number in numbers):
            return None
        values.append(tuple(float(number) for number in numbers))
    means, stds = values
    if len(means) != len(stds) or min(stds) <= 0:
        return None
    # Pixels to 1 have no larger mean, and at most a std of 1, where nothing is divided.
    if of_bytes or max(means) > 1 or max(stds) > 2:
        means, stds = tuple(v / 255 for v in means), tuple(v / 255 for v in stds)
    return (means, stds) if max(means) <= 1 else None


def is_text(name: Any) -> bool:
    """Whether a name can be written to a file: a lone surrogate cannot."""
    return isinstance(name, str) and not any(0xD800 <= ord(c) < 0xE000 for c in name)


def as_names(value: Any) -> tuple[str, ...] | None:
    """Class names in the order of the outputs: a list of text, or `{"0": "cat", …}`."""
    if isinstance(value, Mapping):
        numbered = [value.get(str(number)) for number in range(len(value))]
        value = None if None in numbered else numbered
    if isinstance(value, list | tuple) and value and all(is_text(name) and name for name in value):
        return tuple(value)
    return None


def options_of(
    size: tuple[int, int] | None = None,
    resize: float | None = None,
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    interpolation: Interpolation | None = None,
    crop_ratio: float | None = None,
) -> PreprocessingOptions:
    """What was found, as one object."""
    mean, std = mean_and_std or (None, None)
    return PreprocessingOptions(
        size, None if resize is None else int(resize), mean, std, interpolation, crop_ratio=crop_ratio
    )
