"""The command `predict`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from repvgg_deploy.cli.main import main


def run(*arguments: object, status: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr


def test_rows_are_printed_as_lines_of_json(checkpoint_file: Path, image_folder: Path) -> None:
    stdout, _ = run(checkpoint_file, image_folder / "class0", "--size", 32, "--topk", 2)
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["0.png", "1.jpg", "2.bmp"]
    assert {len(row["classes"]) for row in rows} == {2}


def test_json_is_a_summary_and_broken_images_are_counted(
    checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "class0" / "0.png").write_bytes(b"no image")
    output = tmp_path / "rows.csv"
    stdout, stderr = run(checkpoint_file, image_folder, "--size", 32, "-o", output, "--json")
    summary = json.loads(stdout)
    assert (summary["images"], summary["broken"], summary["file"]) == (15, 1, str(output))
    assert "warning: 1 image could not be read; its row contains the error" in stderr
    _, stderr = run(checkpoint_file, image_folder, "--size", 32, "-o", tmp_path / "b.csv", "--strict", status=1)
    assert "0.png is not an image" in stderr


@pytest.mark.parametrize("option", ["--resume", "--json"])
def test_options_of_a_file_need_one(option: str, checkpoint_file: Path, image_folder: Path) -> None:
    _, stderr = run(checkpoint_file, image_folder, option, status=2)
    assert "are for -o FILE" in stderr


@pytest.mark.parametrize("arguments", [["--ray"], ["--ray", "local", "-o", "rows", "--resume"], ["--ray-actors", "2"]])
def test_options_of_a_cluster_that_contradict_others_are_wrong_usage(
    arguments: list[str], checkpoint_file: Path, image_folder: Path
) -> None:
    _, stderr = run(checkpoint_file, image_folder, *arguments, status=2)
    assert "--ray" in stderr


def test_missing_ray_says_what_to_install(
    checkpoint_file: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    monkeypatch.setitem(sys.modules, "ray", None)
    _, stderr = run(checkpoint_file, image_folder, "--ray", "local", "-o", tmp_path / "rows", status=1)
    assert "error: Ray is not installed\nhint: pip install 'repvgg-deploy[ray]'" in stderr
    assert not list(tmp_path.glob("rows*"))
