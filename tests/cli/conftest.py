"""Fixtures of the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import NO_ENGINE, run


@pytest.fixture
def graph(checkpoint_file: Path, tmp_path: Path) -> Path:
    result = run("export", checkpoint_file, "-o", tmp_path / "made", "--size", 32, *NO_ENGINE)
    assert result.exit_code == 0, result.output
    return tmp_path / "made" / "checkpoint.fp32.onnx"
