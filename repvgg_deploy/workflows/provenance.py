"""How files were made, as an in-toto statement with SLSA's predicate: what they are, and what they were made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.workflows.lock import Inputs

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:repvgg-deploy:export:v1"
BUILDER = "urn:repvgg-deploy:local"


@dataclass(frozen=True)
class Build:
    """One export: its options, what it read, the versions of the tools, and when it began."""

    options: Mapping[str, Any]
    inputs: Inputs
    tools: Mapping[str, str]
    started: datetime


def make_statement(build: Build, files: list[Path]) -> dict[str, Any]:
    """The statement about `files`; nothing signs it, so it says what was done and not by whom.

    in-toto Statement v1 (in-toto/attestation, spec/v1/statement.md) with the predicate of slsa.dev/provenance/v1.
    """
    return {
        "_type": STATEMENT,
        "subject": [{"name": path.name, "digest": {"sha256": hash_file(path)}} for path in files],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"command": "export", "options": dict(build.options)},
                "resolvedDependencies": list(_list_materials(build.inputs)),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": dict(build.tools)},
                "metadata": {"startedOn": _format_time(build.started), "finishedOn": _format_time(datetime.now(UTC))},
            },
        },
    }


def _list_materials(inputs: Inputs) -> Iterator[dict[str, Any]]:
    for name in ("checkpoint", "recipe", "scales", "labels"):
        file = getattr(inputs, name)
        if file is not None:
            yield {"name": name, "digest": {"sha256": file.sha256}, "annotations": {"path": file.path}}
    images = inputs.calibration
    if images is not None:
        about = {"path": images.source, "images": len(images.files), "files": list(images.files)}
        yield {"name": "calibration list", "digest": {"sha256": images.sha256}, "annotations": about}


def _format_time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def write_statement(statement: Mapping[str, Any], path: Path) -> None:
    """Write a statement as JSON."""
    path.write_text(json.dumps(statement, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
