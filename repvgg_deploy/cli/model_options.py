"""Options of the commands that run a model: how it is opened, and how it is given images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from repvgg_deploy.cli.command import option_group
from repvgg_deploy.cli.options import (
    checkpoint_options,
    decoding_options,
    preprocessing_options,
    ray_options,
    take_checkpoint,
    take_preprocessing,
)

F = TypeVar("F", bound=Callable[..., Any])

strict_option = option_group(
    "Input",
    click.option("--strict", is_flag=True, help="Fail on an image, folder or archive that cannot be read."),
)
"""`--strict`, without which what cannot be read is left out and named."""

_batch_option = option_group(
    "Backend",
    click.option("--batch", type=click.IntRange(min=1), default=64, metavar="N", help="Images per run."),
)

_backend_options = option_group(
    "Backend",
    click.option("--integers", type=click.Choice(["exact", "native"]), default="exact",
                 help="INT8 sums that would saturate on this CPU: computed exactly, or by its native kernels."),
    click.option("--trust", is_flag=True, help="Run an engine whose sidecar is missing or does not match."),
)  # fmt: skip


def model_options(command: F) -> F:
    """How a model of any kind is opened; see `take_model`."""
    return checkpoint_options(preprocessing_options(_backend_options(command)))


def image_run_options(command: F) -> F:
    """How many images are read and run, and where: `strict`, `batch`, and what `take_decoding` and `take_ray` take."""
    return strict_option(decoding_options(_batch_option(ray_options(command))))


def take_model(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of a model from `values` and return the keywords of what opens it: `open_model` and others."""
    return {
        "preprocessing": take_preprocessing(values),
        "checkpoint": take_checkpoint(values),
        "trust": values.pop("trust"),
        "exact_integers": values.pop("integers") == "exact",
    }
