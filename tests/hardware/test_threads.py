"""No thread outlives what started it: else the interpreter ends under it, and the process aborts with status 134."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from repvgg_deploy.hardware.threads import Cancellation, run_cancellable, start_workers

SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}
EXPORT = "import json, sys, threading, time; from repvgg_deploy.cli.main import main; "


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that is raised in the main thread as it is in a command."""

    def exit_with_status(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, exit_with_status)
    yield request.param
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def send(number: signal.Signals, times: int = 1) -> threading.Thread:
    """Send a signal to this process soon, `times` times."""

    def kill() -> None:
        for _ in range(times):
            time.sleep(0.1)
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=kill)
    sender.start()
    return sender


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.slow
def test_workers_end_before_a_signal_leaves_their_block(number: signal.Signals, times: int) -> None:
    done: list[str] = []
    before = set(threading.enumerate())

    def work() -> None:
        time.sleep(0.4)
        done.append("work")

    sender = send(number, times)
    with pytest.raises(SIGNALS[number]), start_workers(1) as pool:
        pool.submit(work)
    assert done == ["work"]
    sender.join()
    assert set(threading.enumerate()) <= before


def test_workers_end_before_an_error_leaves_their_block() -> None:
    done: list[str] = []
    before = set(threading.enumerate())

    def fail() -> None:
        with start_workers(2) as pool:
            pool.submit(lambda: (time.sleep(0.1), done.append("work")))
            raise ValueError("a reason")

    with pytest.raises(ValueError, match="a reason"):
        fail()
    assert done == ["work"]
    assert set(threading.enumerate()) <= before


def test_a_signal_cancels_a_long_call_and_waits_for_its_end(number: signal.Signals) -> None:
    cancellation, ended = Cancellation(), threading.Event()

    def work() -> None:
        deadline = time.monotonic() + 10
        while not cancellation.is_wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        ended.set()

    sender = send(number)
    with pytest.raises(SIGNALS[number]):
        run_cancellable(work, cancellation)
    assert cancellation.is_wanted
    assert ended.is_set()
    sender.join()


@pytest.mark.slow
def test_no_thread_of_a_failed_export_is_left(tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(b"PK" + bytes(1 << 20))
    script = EXPORT + (
        "\nfor name in sys.argv[1:]:"
        "\n    status = main(['export', name, '--engine', 'none'], standalone_mode=False)"
        "\n    print(json.dumps([status, [t.name for t in threading.enumerate() if t.name != 'signals']]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "missing.pth", "broken.pth"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [[1, ["MainThread"]]] * 2
