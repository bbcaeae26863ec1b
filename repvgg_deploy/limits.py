"""Measured values beside the limits that they are held to: what a gate decides on, and what a report of it shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from repvgg_deploy.errors import DeployError


@dataclass(frozen=True)
class LimitCheck:
    """A measured value and the limit that it was held to.

    `name` says what and which limit: `net.onnx: top-1 in percent, --min-top1`. `limit` is None where the command has
    its own. `failure` is None if the limit was met.
    """

    name: str
    value: float
    limit: float | None
    failure: DeployError | None = None


def first_failure(checks: Iterable[LimitCheck]) -> DeployError | None:
    """The failure of the first limit that was missed; None if all were met."""
    return next((check.failure for check in checks if check.failure is not None), None)
