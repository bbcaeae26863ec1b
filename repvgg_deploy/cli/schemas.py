"""The versions of the JSON objects that the commands print; docs/schemas describes each."""

from __future__ import annotations

VERSIONS = {
    "archs": 1,
    "bench": 2,
    "demo": 1,
    "doctor": 1,
    "end-to-end": 1,
    "error": 1,
    "eval": 1,
    "export": 1,
    "export-all": 1,
    "export-module": 1,
    "fuse": 1,
    "inspect": 1,
    "package": 1,
    "predict": 1,
    "profile": 1,
    "pull": 1,
    "pull-list": 1,
    "qat": 1,
    "refit": 1,
    "report": 1,
    "verify": 1,
}
"""By name. A version is raised when a field is removed or changes its meaning, not when one is added."""
