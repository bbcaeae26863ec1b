"""The errors that a user can fix: a message that says what is wrong, a hint that says what to do.

Beside them what a gate decides on, and what a report of it shows: measured values with the limits they are held to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class DeployError(Exception):
    """A failure that the user can fix; the command line prints it as `error:` and `hint:` and exits 1.

    A programming error is never a `DeployError`: it keeps its traceback.

    Example:
        >>> from repvgg_deploy import DeployError, load_checkpoint
        >>> try:
        ...     load_checkpoint("missing.pth")
        ... except DeployError as error:
        ...     print(error.message)
        there is no file missing.pth
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(DeployError):
    """A checkpoint that cannot be read, or that does not hold a RepVGG."""


class ImageError(DeployError):
    """An image, or a folder of images, that cannot be used."""


class FusionError(DeployError):
    """A block whose branches have no equivalent single convolution."""


class GraphError(DeployError):
    """An ONNX graph that cannot be made, read or run."""


class VerificationError(DeployError):
    """Two stages whose outputs should agree and do not; nothing is written."""


class ThresholdError(DeployError):
    """A measured value that violates a limit set by the user."""


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
