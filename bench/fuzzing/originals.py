"""Whole files that the package itself leaves and reads again, made by its own commands in a process of its own.

    python -m fuzzing.originals FOLDER

Training starts threads, and what forks the cases must have none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fuzzing.checkpoints import whole_safetensors
from fuzzing.graphs import class_folders
from fuzzing.texts import whole_recipe

# Paths are part of what a state belongs to: the commands run in the folder `out`, beside `in`.
EXPORT = ("export", "../in/net.safetensors", "-o", ".", "--engine", "none", "--size", "32")
INT8 = (*EXPORT, "--int8", "--calib", "../in/data", "--recipe", "../in/recipe.toml")
QAT = ("qat", "../in/net.safetensors", "--data", "../in/data", "--calib", "../in/data", "-o", "trained.safetensors",
       "--steps", "3", "--batch", "4", "--recipe", "../in/recipe.toml", "--size", "32")  # fmt: skip
STATE = "trained.qat-state.pt"


def input_files() -> dict[str, bytes]:
    """What the commands read."""
    return {"net.safetensors": whole_safetensors(), "recipe.toml": whole_recipe(), **class_folders()}


@dataclass(frozen=True)
class Originals:
    """The outputs of whole runs by name, lock files by the precision, and the state of a run that was stopped."""

    outputs: Mapping[str, bytes]
    locks: Mapping[str, bytes]
    state: bytes


@cache
def originals() -> Originals:
    """The files; made once per process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place, content in input_files().items():
            path = folder / "in" / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for place in ("out", "locks", "stopped"):
            (folder / place).mkdir()
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
        command = [sys.executable, "-m", "fuzzing.originals", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the originals cannot be made: {done.stderr[-2000:]}")
        outputs, locks = (
            {path.name: path.read_bytes() for path in sorted((folder / place).iterdir())} for place in ("out", "locks")
        )
        return Originals(outputs, locks, (folder / "stopped" / STATE).read_bytes())


def _make(folder: Path) -> None:
    import torch

    from repvgg_deploy.quantization.qat_training import QatTraining

    torch.set_num_threads(1)
    os.chdir(folder / "out")
    _run(*EXPORT, "--lock", "../locks/fp32.toml")
    _run(*INT8, "--lock", "../locks/int8.toml")
    _run(*QAT)
    step = QatTraining.step

    def stop(training: QatTraining, *arguments: object) -> object:
        if training.done == 2:
            raise KeyboardInterrupt
        return step(training, *arguments)  # type: ignore[arg-type]

    QatTraining.step = stop  # type: ignore[method-assign, assignment]
    os.chdir(folder / "stopped")
    _run(*QAT, "--interval", "0", status=1)


def _run(*arguments: str, status: int = 0) -> None:
    from repvgg_deploy.cli.main import main

    try:
        main.main([*arguments, "--quiet"], prog_name="repvgg-deploy")
    except SystemExit as end:
        if (end.code or 0) != status:
            raise RuntimeError(f"{' '.join(arguments)} ends with {end.code}") from end


if __name__ == "__main__":
    _make(Path(sys.argv[1]).absolute())
