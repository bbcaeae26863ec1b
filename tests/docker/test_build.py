"""docker/build.sh takes the engine that works, says why there is none, and names what it builds from."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import repvgg_deploy

SCRIPT = Path(__file__).parents[2] / "docker" / "build.sh"
TOOLS = ("sh", "dirname", "sed", "git", "date")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with what the script needs and no engine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found is not None:
            (folder / tool).symlink_to(found)
    return folder


def add_engine(programs: Path, name: str, answers: bool) -> None:
    """A program that answers `info` or not, and for all else prints its arguments, one per line."""
    status = 0 if answers else 1
    (programs / name).write_text(
        f'#!/bin/sh\ncase $1 in info|--version) exit {status};; esac\nprintf "%s\\n" {name} "$@"\n'
    )
    (programs / name).chmod(0o755)


def build(programs: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name == "HOME"}
    return subprocess.run(
        [programs / "sh", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, **environment, "PATH": str(programs)},
    )


def test_without_an_engine_it_says_what_is_missing(programs: Path) -> None:
    add_engine(programs, "docker", answers=False)
    done = build(programs)
    assert (done.returncode, done.stdout) == (1, "")
    assert "docker is installed but does not answer, podman is not installed, buildah is not installed" in done.stderr
    assert "hint: install" in done.stderr


def test_an_engine_that_does_not_answer_is_passed_over(programs: Path) -> None:
    add_engine(programs, "docker", answers=False)
    add_engine(programs, "buildah", answers=True)
    said = build(programs, "gpu", GPU_BASE="base:1", OPTIONS="--no-cache -q").stdout.splitlines()
    assert said[:4] == ["buildah", "bud", "--format", "docker"]
    assert "GPU_BASE=base:1" in said
    assert said[said.index("--target") + 1] == "gpu"
    assert {"--no-cache", "-q", "repvgg-deploy:gpu", f"VERSION={repvgg_deploy.__version__}"} <= set(said)
    assert said[-1] == "."


def test_build_arguments_come_from_the_environment(programs: Path) -> None:
    for name in ("docker", "podman"):
        add_engine(programs, name, answers=True)
    values = {"TORCH_INDEX": "index", "EXTRAS": "rtx serve", "TAG": "mine:1"}
    said = build(programs, ENGINE="podman", **values).stdout.splitlines()
    assert said[0] == "podman"
    assert {"TORCH_INDEX=index", "EXTRAS=rtx serve", "mine:1", "cpu"} <= set(said)
    assert not [word for word in said if word.startswith(("CPU_BASE=", "PIP_"))]


def test_there_is_no_third_image(programs: Path) -> None:
    assert build(programs, "tpu").returncode == 2
