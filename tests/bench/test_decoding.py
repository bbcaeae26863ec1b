"""The decoding benchmark runs, and its record says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from decoding import Bound, Rates, find_bounds, main
from helpers.engine_graphs import small_onnx
from helpers.pictures import jpeg

from repvgg_deploy.images.jpeg import find_simplejpeg


@pytest.mark.slow
@pytest.mark.skipif(find_simplejpeg() is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("is_graph", [True, False])
def test_record_has_every_rate_and_the_bounds_of_the_whole(
    is_graph: bool, checkpoint_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(number, (300, 260)))
    model = small_onnx(tmp_path) if is_graph else checkpoint_file
    options = {"--images": tmp_path / "images", "--model": model, "--count": 8, "--rounds": 2, "-o": tmp_path / "out"}
    arguments = [str(word) for pair in options.items() for word in pair]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out").glob("*.json")
    record = json.loads(path.read_text())
    assert record["pixel_differences"]["largest"] <= 2
    rates, costs = record["images_per_sec"], record["cpu_ms_per_image"]
    assert {len(values) for values in (*rates.values(), *costs.values())} == {2}
    assert set(record["predict"]) == {name for name in rates if name.startswith("predict")}
    assert ("predict, simplejpeg, 1 thread each" in rates) == is_graph
    for name, bound in record["predict"].items():
        assert bound["kind"] == ("slower" if name.endswith("1 thread each") else "both")
        assert bound["bound"] > 0


def test_what_shares_cores_can_reach_less_than_what_does_not() -> None:
    rates = {"inference": 100.0, "inference, 1 thread": 60.0}
    rates |= {"decode, simplejpeg": 300.0, "decode, simplejpeg, 1 thread": 160.0}
    rates |= {"predict, simplejpeg": 70.0, "predict, simplejpeg, 1 thread each": 57.0}
    measured = {name: Rates([rate], [1000 / rate]) for name, rate in rates.items()}
    bounds = find_bounds(measured, of_engine=False)
    assert bounds["predict, simplejpeg"] == Bound("both", 70.0, 75.0, 14.286, 13.333)
    assert bounds["predict, simplejpeg, 1 thread each"] == Bound("slower", 57.0, 60.0, 17.544, 22.917)
    assert bounds["predict, simplejpeg, 1 thread each"].share == 0.95
    of_engine = {name: measured[name] for name in ("inference", "decode, simplejpeg", "predict, simplejpeg")}
    assert find_bounds(of_engine, of_engine=True)["predict, simplejpeg"].bound == 100.0
