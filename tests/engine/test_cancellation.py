"""Ctrl-C and failing callbacks end a build cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.engine_graphs import rtx_backend, small_onnx
from helpers.progress import Heard

from repvgg_deploy.engine import BuildOptions, build_engine
from repvgg_deploy.engine.log import get_logger
from repvgg_deploy.engine.network import parse_onnx
from repvgg_deploy.files.staging import stage_files

NO_CACHE = BuildOptions(timing_cache=False)


@pytest.fixture(autouse=True)
def listen_to_ctrl_c() -> Iterator[None]:
    """A shell lets what it starts in the background ignore Ctrl-C, and with it the processes that the tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_ends_a_build_and_leaves_nothing(tmp_path: Path) -> None:
    onnx, output, backend = small_onnx(tmp_path), tmp_path / "out", rtx_backend()
    pressed: list[float] = []

    def interrupt(_name: str, done: float, _total: float) -> None:
        if not pressed:
            os.kill(os.getpid(), signal.SIGINT)
        pressed.append(done)

    with pytest.raises(KeyboardInterrupt), stage_files(output) as staging:
        build_engine(onnx, backend, NO_CACHE, staging, Heard(on_step=interrupt))
    assert not output.exists()
    assert not list(tmp_path.glob("**/*.plan*"))
    # The library still builds after a build that was ended.
    assert build_engine(onnx, backend, NO_CACHE, tmp_path).plan.is_file()


def test_ctrl_c_while_the_graph_is_parsed_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library's logger is called while it parses; what is raised there never reaches Python's caller.
    backend = rtx_backend()
    onnx = small_onnx(tmp_path)
    logger = type(get_logger(backend))
    log = logger.log
    pressed: list[str] = []

    def press(self: object, severity: object, text: str) -> None:
        if not pressed:
            pressed.append(text)
            os.kill(os.getpid(), signal.SIGINT)
        log(self, severity, text)

    monkeypatch.setattr(logger, "log", press)
    with pytest.raises(KeyboardInterrupt):
        parse_onnx(backend, onnx)
    assert pressed


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own_ends_it_by_the_signal(tmp_path: Path) -> None:
    rtx_backend()
    onnx, output = small_onnx(tmp_path), tmp_path / "out"
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from repvgg_deploy.engine import BuildOptions, build_engine, find_backend
        from repvgg_deploy.files.staging import stage_files

        class Interrupting:
            def note(self, text):
                pass

            def step(self, name, done, total):
                os.kill(os.getpid(), signal.SIGINT)

        with stage_files(Path(sys.argv[2])) as staging:
            options = BuildOptions(timing_cache=False)
            build_engine(Path(sys.argv[1]), find_backend("tensorrt-rtx"), options, staging, Interrupting())
        """
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(onnx), str(output)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in ran.stderr
    assert not output.exists()


def test_a_failing_progress_bar_is_raised_not_swallowed(tmp_path: Path) -> None:
    def fail(_name: str, _done: float, _total: float) -> None:
        raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        build_engine(small_onnx(tmp_path), rtx_backend(), NO_CACHE, tmp_path, Heard(on_step=fail))
    assert not list(tmp_path.glob("*.plan*"))


@pytest.mark.slow
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    onnx, backend = small_onnx(tmp_path), rtx_backend()
    (tmp_path / "net.fp32.plan").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        build_engine(onnx, backend, NO_CACHE, tmp_path)
    assert not (tmp_path / "net.fp32.plan").is_symlink()
