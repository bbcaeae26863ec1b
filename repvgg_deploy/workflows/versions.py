"""The versions of everything that decides what an artifact contains."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress

import repvgg_deploy

_LIBRARIES = (
    "torch", "onnx", "onnxsim", "onnxruntime", "onnxruntime-gpu", "numpy", "Pillow", "simplejpeg", "tensorrt",
    "tensorrt-rtx",
)  # fmt: skip


def installed_versions() -> dict[str, str]:
    """The versions of this tool, of Python, and of each library that is installed here, by name."""
    found = {"repvgg-deploy": repvgg_deploy.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
