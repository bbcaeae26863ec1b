"""Ctrl-C and SIGTERM end a command at once, wherever it is, and leave nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers.commands import NO_ENGINE
from helpers.interrupt import interrupt

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def run(script: str, *arguments: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """A script in a process that listens to signals; `kill(number)` sends itself one."""
    head = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom repvgg_deploy.cli.signals import end_on_signals\n"
    )
    head += "number = int(sys.argv[1])\nkill = lambda: os.kill(os.getpid(), number)\nend_on_signals()\n"
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def ended(done: subprocess.CompletedProcess[str], number: signal.Signals) -> bool:
    """Whether the process was ended by the signal, and says so and nothing else."""
    return (done.returncode, done.stderr, done.stdout) == (128 + number, "\nAborted!\n", "")


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [*NUMBERS, signal.SIGHUP])
def test_a_signal_ends_the_process_with_its_status(number: signal.Signals) -> None:
    assert ended(run("kill(); time.sleep(30)", number), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_where_an_exception_would_be_lost_the_signal_is_not(number: signal.Signals) -> None:
    # What ctypes does with an exception of a callback: it prints it, and goes on.
    script = """
        import ctypes
        def call_back(_a, _b):
            kill()
            return 0
        numbers = (ctypes.c_int * 2)(2, 1)
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
        ctypes.CDLL(None).qsort(numbers, 2, ctypes.sizeof(ctypes.c_int), kind(call_back))
        time.sleep(30)
    """
    assert ended(run(script, number), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_long_call_into_c_is_not_waited_for(number: signal.Signals) -> None:
    script = """
        import ctypes, threading
        threading.Timer(0.3, kill).start()
        ctypes.CDLL(None).sleep(30)
    """
    done = run(script, number, timeout=20)
    assert ended(done, number)


@pytest.mark.parametrize("number", NUMBERS)
def test_code_that_catches_everything_does_not_go_on(number: signal.Signals) -> None:
    script = """
        while True:
            try:
                kill()
                time.sleep(30)
            except BaseException:
                print("caught")
    """
    assert ended(run(script, number), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_an_import_is_never_taken_for_a_module_that_does_not_load(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("kill()\nimport time\ntime.sleep(30)\n")
    script = f"""
        import builtins
        builtins.kill = kill
        sys.path.insert(0, {str(tmp_path)!r})
        try:
            import slow_module
        except BaseException:
            print("does not load")
    """
    assert ended(run(script, number), number)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_what_was_begun_on_the_disk_is_undone_even_while_threads_write_to_it(
    number: signal.Signals, tmp_path: Path
) -> None:
    script = """
        import threading
        from repvgg_deploy.files.staging import scratch_folder, stage_files
        from repvgg_deploy.files.abort import undone_on_abort
        def write(folder):
            for n in range(10**6):
                (folder / str(n)).write_bytes(b"x" * 1000)
        with scratch_folder() as scratch, stage_files(Path(sys.argv[2])) as staging:
            for folder in (scratch, staging):
                threading.Thread(target=write, args=(folder,), daemon=True).start()
            time.sleep(0.2)
            kill()
            time.sleep(30)
    """
    out, scratch = tmp_path / "a" / "out", tmp_path / "tmp"
    scratch.mkdir()
    os.environ["TMPDIR"], before = str(scratch), os.environ.get("TMPDIR")
    try:
        done = run(script, number, out)
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
    assert done.returncode == 128 + number
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]


def test_the_user_is_told_what_an_ended_command_left(tmp_path: Path) -> None:
    script = """
        from repvgg_deploy.files.abort import undone_on_abort
        with undone_on_abort(lambda: "note: \\033half of it is kept"), undone_on_abort(lambda: None):
            kill()
            time.sleep(30)
    """
    done = run(script, signal.SIGTERM, tmp_path)
    assert (done.returncode, done.stderr) == (143, "\nAborted!\nnote: \\x1bhalf of it is kept\n")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_comes_after_the_results_is_too_late(number: signal.Signals, tmp_path: Path) -> None:
    script = """
        from repvgg_deploy.files.staging import stage_files
        with stage_files(Path(sys.argv[2])) as staging:
            (staging / "a").write_text("1")
        kill()
        time.sleep(0.2)
        print("done")
    """
    done = run(script, number, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert (tmp_path / "a").read_text() == "1"


def test_a_cache_that_was_written_is_no_reason_to_go_on(tmp_path: Path) -> None:
    script = """
        from repvgg_deploy.files.staging import stage_files
        with stage_files(Path(sys.argv[2]), is_result=False) as staging:
            (staging / "cache").write_text("1")
        kill()
        time.sleep(30)
    """
    assert ended(run(script, signal.SIGINT, tmp_path), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    code = "import os, signal, time; from repvgg_deploy.cli.signals import end_on_signals\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_IGN); end_on_signals()\n"
    code += "os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.2); print('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "on\n")


@pytest.mark.slow
def test_commands_end_cleanly_at_random_moments(checkpoint_file: Path, tmp_path: Path) -> None:
    """A small share of what `bench/reliability.py kill` does."""
    draw = random.Random(0)
    for number in range(4):
        folder = tmp_path / f"try{number}"
        command = ["export", str(checkpoint_file), "-o", str(folder / "out"), "--size", "32", "--engine", "none"]
        found = interrupt(command, folder, draw.choice(NUMBERS), draw.uniform(0.0, 3.0))
        assert found.fault(["out/checkpoint.fp32.onnx"]) is None, found


@pytest.mark.slow
def test_sigterm_takes_back_what_was_begun(checkpoint_file: Path, tmp_path: Path) -> None:
    """What ends a container: the export is stopped while its graph is being written."""
    script = (
        "import time; from repvgg_deploy.workflows import export as pipeline; from repvgg_deploy.__main__ import run; "
        "pipeline.write_graph = lambda *_: time.sleep(60); run()"
    )
    out = tmp_path / "out"
    options = ["export", str(checkpoint_file), "--size", "32", "-o", str(out), *NO_ENGINE]
    process = subprocess.Popen([sys.executable, "-c", script, *options], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out.exists() and any(out.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    assert not out.exists()
