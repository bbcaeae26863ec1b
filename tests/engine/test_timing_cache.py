"""The timing cache: one a library version and GPU, kept between builds, locked while one runs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.engine_graphs import rtx_backend, small_onnx
from helpers.progress import Heard

from repvgg_deploy.engine import BuildOptions, build_engine
from repvgg_deploy.engine.backends import Backend, Capabilities
from repvgg_deploy.engine.network import create_builder
from repvgg_deploy.engine.timing_cache import cache_path, use_timing_cache
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import cache_folder
from repvgg_deploy.hardware.gpus import Gpu, find_gpus
from repvgg_deploy.progress import SILENT

L40 = Gpu("NVIDIA L40S", "8.9", 48 << 30)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def this_gpu() -> Gpu | None:
    gpus = find_gpus().gpus
    return gpus[0] if gpus else None


def test_the_cache_is_in_the_users_cache_folder(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == own_cache / "repvgg-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().is_relative_to(Path.home())


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DeployError, match="no home folder") as raised:
        cache_folder()
    assert raised.value.hint == "set XDG_CACHE_HOME"


def test_backend_version_and_gpu_each_have_a_cache_of_their_own() -> None:
    capabilities = Capabilities(False, True, True, False, None)
    backends = [Backend("tensorrt", "10.16.1", None, capabilities), Backend("tensorrt", "11.4.0", None, capabilities)]
    backends.append(Backend("tensorrt-rtx", "1.7.1", None, capabilities))
    gpus = [None, L40, Gpu("NVIDIA L4", "8.9", 1), Gpu("NVIDIA L40S", "9.0", 1)]
    paths = {cache_path(backend, gpu) for backend in backends for gpu in gpus}
    assert len(paths) == len(backends) * len(gpus)
    assert all("/" not in path.name and " " not in path.name for path in paths)


@pytest.mark.slow
def test_a_build_keeps_its_cache_for_the_next_one(tmp_path: Path) -> None:
    backend, onnx = rtx_backend(), small_onnx(tmp_path)
    path = cache_path(backend, this_gpu())
    assert not path.exists()
    build_engine(onnx, backend, BuildOptions(), tmp_path)
    assert path.stat().st_size > 0
    config = create_builder(backend).create_builder_config()
    with use_timing_cache(backend, config, this_gpu(), SILENT) as was_there:
        assert was_there


@pytest.mark.slow
def test_no_cache_is_written_where_none_is_wanted(tmp_path: Path, own_cache: Path) -> None:
    build_engine(small_onnx(tmp_path), rtx_backend(), BuildOptions(timing_cache=False), tmp_path)
    assert not own_cache.exists()


@pytest.mark.slow
def test_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    backend, onnx = rtx_backend(), small_onnx(tmp_path)
    path = cache_path(backend, this_gpu())
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no timing cache" * 10)
    assert build_engine(onnx, backend, BuildOptions(), tmp_path).plan.is_file()
    assert b"no timing cache" not in path.read_bytes()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_the_cache_not_the_build(tmp_path: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be", encoding="utf-8")
    heard = Heard()
    engine = build_engine(small_onnx(tmp_path), rtx_backend(), BuildOptions(), tmp_path, heard)
    assert engine.plan.is_file()
    assert any("no timing cache" in line for line in heard.notes)


@pytest.mark.slow
def test_a_second_build_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    backend, onnx = rtx_backend(), small_onnx(tmp_path)
    path = cache_path(backend, this_gpu())
    path.parent.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path) + ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    waited_from = time.perf_counter()

    def let_go(_text: str) -> None:
        holder.stdin.write("\n")
        holder.stdin.flush()

    heard = Heard(on_note=let_go)
    with holder:
        build_engine(onnx, backend, BuildOptions(), tmp_path, heard)
    assert time.perf_counter() - waited_from >= 0.5
    assert heard.notes == [f"another build has locked {path}.lock; waiting for it"]


_HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
    time.sleep(0.5)
"""


@pytest.mark.slow
def test_the_lock_is_given_back_after_a_failed_build(tmp_path: Path) -> None:
    backend, onnx = rtx_backend(), small_onnx(tmp_path)

    def fail(_name: str, _done: float, _total: float) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        build_engine(onnx, backend, BuildOptions(), tmp_path, Heard(on_step=fail))
    assert not cache_path(backend, this_gpu()).exists()
    heard = Heard()
    build_engine(onnx, backend, BuildOptions(), tmp_path, heard)
    assert not heard.notes


@pytest.mark.slow
def test_a_user_without_a_home_folder_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", refuse)
    heard = Heard()
    build_engine(small_onnx(tmp_path), rtx_backend(), BuildOptions(), tmp_path, heard)
    assert any("no timing cache: there is no home folder" in note for note in heard.notes)
