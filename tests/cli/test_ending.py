"""A process that is done ends without taking the interpreter apart; what its end promises is done all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, os, sys, threading, time
from repvgg_deploy.cli.ending import QuickEnd
ending = QuickEnd()
{before}
class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")
kept = Kept()
atexit.register(print, "exit function")
threading.Thread(target=lambda: [time.sleep(0.1), print("thread")]).start()
print("done", end=" ")
{end}
"""


def run(end: str, before: str = "") -> tuple[int, list[str]]:
    command = [sys.executable, "-c", PROGRAM.format(before=before, end=end)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout.split("\n")


def test_threads_exit_functions_and_output_are_waited_for_and_nothing_is_taken_apart() -> None:
    assert run("ending.prepare(3); sys.exit(3)") == (3, ["done thread", "exit function", ""])


@pytest.mark.parametrize("observer", ["sys.settrace(lambda *_: None)", "sys.setprofile(lambda *_: None)"])
def test_tracers_and_profilers_see_the_usual_end(observer: str) -> None:
    assert run("ending.prepare(0)", observer) == (0, ["done thread", "exit function", "taken apart", ""])


def test_an_uncaught_error_ends_as_usual() -> None:
    assert run("raise ValueError") == (1, ["done thread", "exit function", "taken apart", ""])
