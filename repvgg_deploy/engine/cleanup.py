"""Releasing resources one after another, even if a step fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from repvgg_deploy.errors import DeployError


def release_at_close(stack: ExitStack, step: Callable[..., object], *arguments: object) -> None:
    """Let `stack` call `step` when it is closed, even if another step failed; the first failure is raised.

    After a fault of the GPU every further call reports that same fault: it must not hide where the fault was seen.
    """

    def leave(_kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            step(*arguments)
        except DeployError:
            if error is None:
                raise

    stack.push(leave)
