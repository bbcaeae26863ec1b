"""Options that several commands share, one group a concern, and the types that they parse to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from repvgg_deploy.model import PreprocessingOptions

    SizeType = click.ParamType[tuple[int, int]]
    ChannelsType = click.ParamType[tuple[float, ...]]
else:
    # Older releases of click have no generic ParamType.
    SizeType = ChannelsType = click.ParamType

F = TypeVar("F", bound=Callable[..., Any])


class Size(SizeType):
    """`224`, or `HxW` as in `192x256`, as (height, width)."""

    name = "PX|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse `value`, or fail as wrong usage."""
        match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", str(value))
        if match is None or "0" in (match[1], match[2]):
            self.fail(f"{value!r} is no size; give pixels, as 224 or 192x256", param, ctx)
        return int(match[1]), int(match[2] or match[1])


class Channels(ChannelsType):
    """One number a channel, separated by commas or spaces, as `0.485,0.456,0.406`."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse `value`, or fail as wrong usage."""
        try:
            numbers = tuple(float(part) for part in re.split(r"[,\s]+", str(value).strip()))
        except ValueError:
            self.fail(f"{value!r} is not one number a channel, as 0.485,0.456,0.406", param, ctx)
        return numbers


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def checkpoint_options(command: F) -> F:
    """How a checkpoint is read."""
    return _stack(
        click.option("--arch", metavar="NAME", help="The architecture that the checkpoint must hold: A0, B1g4, …"),
        click.option("--ema/--no-ema", default=None, help="Take the EMA copy of the weights, or the plain ones."),
    )(command)


def preprocessing_options(command: F) -> F:
    """How an image becomes the input; the model's metadata or card by default."""
    return _stack(
        click.option("--size", type=Size(), help="Input size in pixels."),
        click.option("--resize", type=click.IntRange(min=1), metavar="PX", help="Short side before the crop."),
        click.option("--mean", type=Channels(), help="Mean a channel, of values from 0 to 1."),
        click.option("--std", type=Channels(), help="Standard deviation a channel."),
    )(command)


def json_option(command: F) -> F:
    """JSON on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def path_argument(name: str, **options: Any) -> Callable[[F], F]:
    """A path; whether it exists is told by the code that opens it, as an error with a hint."""
    return click.argument(name, type=click.Path(path_type=Path), **options)


def take_preprocessing(values: dict[str, Any]) -> PreprocessingOptions:
    """Remove the preprocessing options from `values` and return them as one object."""
    from repvgg_deploy.model import PreprocessingOptions

    return PreprocessingOptions(*(values.pop(name) for name in ("size", "resize", "mean", "std")))
