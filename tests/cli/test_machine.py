"""The command `demo`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from repvgg_deploy.cli.main import main


@pytest.mark.slow
def test_the_demo_shows_the_other_rows_where_one_fails_and_names_the_files_that_it_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from repvgg_deploy.artifacts import Precision
    from repvgg_deploy.errors import VerificationError
    from repvgg_deploy.workflows import demo

    real = demo.export

    def fail_in_int8(request, *others):
        if request.precision is Precision.INT8:
            raise VerificationError("the outputs differ", "")
        return real(request, *others)

    monkeypatch.setattr(demo, "export", fail_in_int8)
    for name, value in {"_IMAGES": 24, "_CALIBRATION_IMAGES": 2, "_ROUNDS": 2, "_BATCH": 8}.items():
        monkeypatch.setattr(demo, name, value)
    result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: not in the table: fused int8: the outputs differ" in result.stderr
    lines = result.stdout.splitlines()
    files = ["demo.fp32.onnx", "demo.fp16.onnx", "predictions.png"]
    assert lines[-3:] == [str(tmp_path / name) for name in files]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.size == (828, 756)
    assert [line.split("  ")[0] for line in lines[1:-4]] == ["training", "fused", "training", "fused", "fused fp16"]
