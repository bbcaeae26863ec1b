"""The engine backend that an export was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repvgg_deploy.progress import Progress

if TYPE_CHECKING:
    from repvgg_deploy.engine import Backend


def choose_backend(name: str, progress: Progress) -> Backend | None:
    """The backend of this name, `auto` for the first that is there; None, with a note that says why, if there is none.

    Called before any work is done, so that a named backend that is missing is an error at once.

    Raises:
        DeployError: the backend is named, and missing.
    """
    if name == "none":
        return None
    from repvgg_deploy.engine import Unavailable, find_backend

    backend = find_backend(name)
    if isinstance(backend, Unavailable):
        progress.note(f"no engine will be built: {backend.reason}")
        return None
    return backend
