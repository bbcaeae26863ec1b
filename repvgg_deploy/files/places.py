"""Where the tool's own files are: what is installed with it, and the user's cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from repvgg_deploy.errors import DeployError


def data_folder(name: str) -> Path:
    """The folder `models` or `calibration`, as installed from a wheel or as found in the repository."""
    package = Path(__file__).resolve().parents[1]
    packed = package / "_data" / name
    return packed if packed.is_dir() else package.parent / name


def cache_folder() -> Path:
    """The user's cache folder of this tool; `XDG_CACHE_HOME` counts where it is set.

    Raises:
        DeployError: there is none, as the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "repvgg-deploy"
    try:
        home = Path.home()
    except RuntimeError as error:
        # A user id that the system does not know, and no HOME.
        raise DeployError("there is no home folder for the cache", "set XDG_CACHE_HOME") from error
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "repvgg-deploy"
