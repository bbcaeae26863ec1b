"""The command line run in this process or as a program, and what it says of a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from click.testing import CliRunner, Result

from repvgg_deploy.cli.main import main

NO_ENGINE = ["--engine", "none"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def object_of(result: Result) -> dict[str, Any]:
    """The one JSON object that stdout consists of."""
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def failed(result: Result) -> str:
    """What stderr says of a failure: `error: …`, then `hint: …`; on stdout nothing, or both as JSON; no traceback."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    *_, error, hint = result.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    if result.stdout:
        value = json.loads(result.stdout)
        assert (value["schema"], value["exit_status"]) == ("repvgg-deploy/error", 1)
        assert [f"error: {value['error']}", f"hint: {value['hint']}"] == [error, hint]
    return error


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repvgg_deploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def failed_late(result: Result) -> str:
    """The error line of a failure that comes after progress was told."""
    assert result.exit_code == 1
    assert result.stdout == ""
    return next(line for line in result.stderr.splitlines() if line.startswith("error: "))
