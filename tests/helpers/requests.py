"""Requests of exports, with the options of the graph among the others as the command line has them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from repvgg_deploy.checkpoints import CheckpointOptions
from repvgg_deploy.workflows.export_request import ExportRequest, GraphRequest

_OF_CHECKPOINT = {field.name for field in fields(CheckpointOptions)}
_OF_GRAPH = {field.name for field in fields(GraphRequest)}


def make_request(checkpoint: Path, output: Path, **options: Any) -> ExportRequest:
    graph = {name: options.pop(name) for name in _OF_GRAPH & options.keys()}
    source = {name: options.pop(name) for name in _OF_CHECKPOINT & options.keys()}
    return ExportRequest(checkpoint, output, source=CheckpointOptions(**source), graph=GraphRequest(**graph), **options)
