"""Fixtures of the tests of the command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from helpers.commands import NO_ENGINE, run

from repvgg_deploy.benchmark.measure import MeasureOptions


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time of a turn, and of the turns none is long: for what is not about the figures."""
    short = partial(MeasureOptions, slice_s=0.01, pause_s=0.0, settle_s=0.0)
    monkeypatch.setattr("repvgg_deploy.benchmark.measure.MeasureOptions", short)


@pytest.fixture
def graph(checkpoint_file: Path, tmp_path: Path) -> Path:
    result = run("export", checkpoint_file, "-o", tmp_path / "made", "--size", 32, *NO_ENGINE)
    assert result.exit_code == 0, result.output
    return tmp_path / "made" / "checkpoint.fp32.onnx"
