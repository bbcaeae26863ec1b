"""Short runs of `qat`, and exports of what they trained."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from helpers.quantized_nets import QUICK_RECIPE
from repvgg_deploy.cli.main import main
from repvgg_deploy.files.places import data_folder

DEMO = data_folder("models") / "demo.safetensors"
SHORT = ("--recipe", QUICK_RECIPE, "--steps", "4", "--batch", "8")


def run(command: str, *arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [command, *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def qat(checkpoint: Path, images: Path, out: Path, *more: str | Path, code: int = 0) -> Result:
    return run("qat", checkpoint, "--data", images, "--calib", images, "-o", out, *SHORT, *more, code=code)


def export_with(checkpoint: Path, scales: Path, out: Path, *more: str, code: int = 0) -> Result:
    return run("export", checkpoint, "--int8", "--calib-cache", scales, "--engine", "none", "-o", out, *more, code=code)
