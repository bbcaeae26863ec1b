"""The program where standard output is full, closed or gone, and where its user has neither a home nor a name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
NOBODY = 54_321


def start(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repvgg_deploy", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("archs",), ("archs", "--json"), ("--help",), ("inspect", "--help")])
def test_a_full_standard_output_is_one_error(arguments: tuple[str, ...]) -> None:
    with FULL.open("w", encoding="utf-8") as full:
        result = start(*arguments, stdout=full)
    assert result.returncode == 1
    error, hint = result.stderr.splitlines()
    assert error == "error: cannot write to standard output: No space left on device"
    assert hint.startswith("hint: ")


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_the_error_of_a_command_is_told_although_its_object_is_not(tmp_path: Path) -> None:
    with FULL.open("w", encoding="utf-8") as full:
        result = start("inspect", str(tmp_path / "missing.onnx"), "--json", stdout=full)
    assert result.returncode == 1
    assert "there is no file" in result.stderr.splitlines()[0]


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = start("archs", stdout=writing)
    os.close(writing)
    assert result.returncode == 1
    assert not result.stderr


@pytest.mark.slow
def test_a_closed_standard_output_is_no_traceback() -> None:
    result = start("archs", preexec_fn=lambda: os.close(1))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user whom the system does not know")
def test_a_user_without_a_name_or_a_home_can_run_it() -> None:
    def become_nobody() -> None:
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        result = start("doctor", stdout=subprocess.PIPE, env=environment, preexec_fn=become_nobody, cwd="/")
    except PermissionError:
        pytest.skip("this Python lies where other users may not go")
    assert result.returncode == 0, result.stderr
    assert "onnxruntime" in result.stdout
