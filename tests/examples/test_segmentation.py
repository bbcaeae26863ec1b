"""The example of a segmentation net: INT8 finds what fp32 finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "segmentation.py"


@pytest.mark.slow
def test_int8_segments_as_well_as_fp32(tmp_path: Path) -> None:
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed")
    spec = importlib.util.spec_from_file_location("segmentation", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    scores = example.main(tmp_path, steps=400)
    assert scores["fp32"] > 60
    assert abs(scores["int8"] - scores["fp32"]) <= 0.5
    # Three columns of four pictures of 64 pixels with two of border on each side, twice enlarged.
    with Image.open(tmp_path / "segmentation.png") as picture:
        assert picture.size == (2 * 3 * 68, 2 * 4 * 68)
