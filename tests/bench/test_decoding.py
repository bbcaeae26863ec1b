"""The decoding benchmark runs, and its record says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from decoding import main
from helpers.pictures import jpeg

from repvgg_deploy.images.jpeg import find_simplejpeg


@pytest.mark.skipif(find_simplejpeg() is None, reason="simplejpeg is not installed")
def test_record_has_every_rate_and_the_bounds_of_the_whole(checkpoint_file: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(number, (300, 260)))
    arguments = [
        "--images",
        tmp_path / "images",
        "--model",
        checkpoint_file,
        "--count",
        8,
        "--rounds",
        2,
        "-o",
        tmp_path,
    ]
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["pixel_differences"]["largest"] <= 2
    assert {len(values) for values in record["images_per_sec"].values()} == {2}
    rates = record["median_images_per_sec"]
    for decoder in ("pillow", "simplejpeg"):
        parts = rates[f"decode, {decoder}, all cores"], rates["inference"]
        assert rates[f"slower of the two, {decoder}"] == min(parts)
        assert 0 < rates[f"shared, {decoder}"] <= min(parts)
