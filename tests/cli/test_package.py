"""The command `package`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from repvgg_deploy.cli.main import main


def run(*arguments: object, status: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr


@pytest.mark.slow
def test_it_says_what_was_written_and_how_near_pillow_the_preprocessing_is(
    checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    run("export", checkpoint_file, "-o", tmp_path, "--size", 64, "--engine", "none", "--io", "fp16", "--fp16")
    graph = tmp_path / "checkpoint.fp16.onnx"
    options = ("--triton", "--name", "net", "--max-batch", 6, "--queue-delay", 7, "--instances", 2, "--device", "cpu")
    stdout, _ = run("package", graph, "-o", tmp_path / "repo", *options, "--no-warm-up", "--data", image_folder)
    assert "net, net_preprocess, net_images" in stdout
    assert "of Pillow's values on 15 images" in stdout
    config = (tmp_path / "repo" / "net" / "config.pbtxt").read_text()
    for line in ("max_batch_size: 6", "max_queue_delay_microseconds: 7", "count: 2", "KIND_CPU", "TYPE_FP16"):
        assert line in config
    assert "model_warmup" not in config


@pytest.mark.parametrize(
    "arguments", [["net.onnx", "-o", "repo"], ["net.onnx", "--triton"], ["--triton", "-o", "repo"]]
)
def test_what_is_missing_is_wrong_usage(arguments: list[str]) -> None:
    _, stderr = run("package", *arguments, status=2)
    assert "Missing" in stderr
