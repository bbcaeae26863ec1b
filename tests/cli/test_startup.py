"""Settings of a command's process: they take hold, leave the user's own alone, and cost no second import."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_deploy.cli import startup
from repvgg_deploy.cli.startup import keep_freed_memory, prepare_process, quick_imports, share_cores


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout


PRINT = "import os; from repvgg_deploy.cli.startup import *; prepare_process(); print(os.environ['OMP_WAIT_POLICY'])"


def test_threads_sleep_unless_the_user_wants_otherwise() -> None:
    assert run(PRINT).strip() == "passive"
    assert run(PRINT, OMP_WAIT_POLICY="active").strip() == "active"


def test_torch_has_as_many_threads_as_a_container_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(startup, "core_limit", lambda: 3)
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(startup, "core_limit", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    share_cores()
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_kept() -> None:
    measure = (
        "import ctypes; from repvgg_deploy.cli.startup import *\n"
        "held = lambda: int(open('/proc/self/statm').read().split()[1])\n"
        "{}\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        "before, size = held(), 1 << 27\n"
        "block = libc.malloc(ctypes.c_size_t(size)); ctypes.memset(block, 1, size)\n"
        "libc.free(ctypes.c_void_p(block)); print(held() - before)"
    )
    pages = (1 << 27) // os.sysconf("SC_PAGE_SIZE")
    assert int(run(measure.format(""))) < pages / 2
    assert int(run(measure.format("prepare_process()"))) > pages / 2


def test_an_older_c_library_keeps_blocks_of_up_to_its_own_limit() -> None:
    accepted: dict[int, int] = {}

    def mallopt(parameter: int, value: int) -> int:
        if parameter == startup._MMAP_THRESHOLD and value > 32 << 20:
            return 0
        accepted[parameter] = value
        return 1

    keep_freed_memory(mallopt)
    assert accepted[startup._MMAP_THRESHOLD] == 32 << 20
    assert accepted[startup._TRIM_THRESHOLD] == startup._LARGEST_INT


@pytest.mark.slow
def test_imports_are_not_searched_for_garbage() -> None:
    frozen = run(
        "import gc; from repvgg_deploy.cli.startup import *\n"
        "with quick_imports():\n    print(gc.isenabled()); import torch\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    assert frozen.split() == ["False", "True", "True"]


def test_a_process_that_has_torch_already_is_left_alone() -> None:
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_it_may_be_called_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    prepare_process()
    prepare_process()


@pytest.mark.slow
def test_a_float_export_imports_nothing_of_quantization_and_benchmarks(checkpoint_file: Path, tmp_path: Path) -> None:
    found = run(
        "import sys; from repvgg_deploy.cli.main import main\n"
        f"main(['export', {str(checkpoint_file)!r}, '-o', {str(tmp_path)!r}, '--engine', 'none', '--size', '32', '-q'],"
        " standalone_mode=False)\n"
        "packages = {'repvgg_deploy.quantization', 'repvgg_deploy.benchmark', 'repvgg_deploy.serving', 'onnxsim'}\n"
        "print('found:', sorted(packages & set(sys.modules)))"
    )
    assert found.splitlines()[-1] == "found: []"
