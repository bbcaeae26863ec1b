"""The CUDA interface, as far as it goes without a GPU: names, errors, arrays and streams of other libraries."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import repvgg_deploy.engine
from repvgg_deploy.engine.cuda import interface as cuda_module
from repvgg_deploy.engine.cuda.interface import LIBRARIES, Cuda, DeviceArray, open_cuda, stream_handle
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware import gpus
from repvgg_deploy.hardware.gpus import FoundGpus, Gpu, find_gpus

H200 = Gpu("NVIDIA H200", "9.0", 141 << 30)
ENGINE = Path(repvgg_deploy.engine.__file__).parent
without_gpu = pytest.mark.skipif(bool(find_gpus().gpus), reason="this machine has a GPU")


def cuda_bindings() -> Any:
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda.bindings (cuda-python) is not installed")


def test_every_name_of_cuda_bindings_that_is_used_exists() -> None:
    runtime = cuda_bindings()
    used = set()
    for file in (ENGINE / "cuda" / "bindings.py", Path(gpus.__file__)):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "runtime":
                used.add(node.attr)
    assert len(used) > 25
    assert not [name for name in used if not hasattr(runtime, name)]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["bindings", "pycuda"])
def test_both_libraries_have_every_method_of_the_interface(module: str) -> None:
    # Read from the source: pycuda cannot be imported without a driver.
    tree = ast.parse((ENGINE / "cuda" / f"{module}.py").read_text(encoding="utf-8"))
    (library,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in ("CudaBindings", "PyCuda")]
    methods = {node.name: [a.arg for a in node.args.args] for node in library.body if isinstance(node, ast.FunctionDef)}
    names = {t.id for node in library.body if isinstance(node, ast.Assign) for t in node.targets}
    for name, member in inspect.getmembers(Cuda):
        if name.startswith("_") or name in names:
            continue
        assert methods[name] == list(inspect.signature(member).parameters), name


@without_gpu
@pytest.mark.parametrize(
    "call",
    [
        lambda cuda: cuda.allocate(1024),
        lambda cuda: cuda.free(0),
        lambda cuda: cuda.allocate_pinned(1024),
        lambda cuda: cuda.create_stream(),
        lambda cuda: cuda.destroy_stream(0),
        lambda cuda: cuda.copy_to_device(0, np.zeros(4), 0),
        lambda cuda: cuda.copy_to_host(np.zeros(4), 0, 0),
        lambda cuda: cuda.synchronize(0),
        lambda cuda: cuda.synchronize_device(),
        lambda cuda: cuda.create_event(),
        lambda cuda: cuda.synchronize_event(SimpleNamespace(handle=0)),
        lambda cuda: cuda.is_capturing(0),
        lambda cuda: cuda.begin_capture(0),
        lambda cuda: cuda.end_capture(0),
    ],
)
def test_each_call_of_cuda_bindings_reports_its_failure(call: Any) -> None:
    cuda_bindings()
    library = importlib.import_module("repvgg_deploy.engine.cuda.bindings").CudaBindings()
    with pytest.raises(DeployError, match="CUDA says CUDA driver version is insufficient"):
        call(library)


@without_gpu
def test_opening_cuda_without_a_gpu_says_why() -> None:
    with pytest.raises(DeployError, match="engines cannot run") as raised:
        open_cuda()
    assert raised.value.hint


def test_only_missing_memory_is_told_as_missing_memory() -> None:
    error = cuda_bindings().cudaError_t
    check = importlib.import_module("repvgg_deploy.engine.cuda.bindings").check
    with pytest.raises(DeployError, match="too little free memory"):
        check((error.cudaErrorMemoryAllocation,), "allocating")
    # Too many registers or threads for one launch, however much memory there is.
    with pytest.raises(DeployError, match=r"launching: CUDA says too many resources requested for launch \(701\)"):
        check((error.cudaErrorLaunchOutOfResources,), "launching")


class Library:
    """A module of the package: opens, or says why not."""

    def __init__(self, opened: object) -> None:
        self._opened = opened

    def open_library(self) -> object:
        if isinstance(self._opened, DeployError):
            raise self._opened
        return self._opened


def test_a_library_that_does_not_fit_the_driver_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    too_new = DeployError("choosing the GPU: CUDA says CUDA driver version is insufficient (35)")
    modules = {"bindings": Library(too_new), "pycuda": Library("pycuda's")}
    monkeypatch.setattr(cuda_module, "_import_quietly", lambda name: modules[name.split(".")[-1]])
    monkeypatch.delenv("REPVGG_DEPLOY_CUDA", raising=False)
    assert open_cuda() == "pycuda's"
    monkeypatch.setattr(cuda_module, "find_gpus", lambda: FoundGpus((H200,)))
    with pytest.raises(DeployError, match=r"no CUDA library for Python works here .*insufficient") as raised:
        open_cuda("cuda.bindings")
    assert "of the driver's CUDA version" in raised.value.hint


def test_what_a_library_warns_of_at_its_start_is_not_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import warnings; warnings.warn('no siphash here'); opened = True"
    (tmp_path / "warning_library.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert cuda_module._import_quietly("warning_library").opened


SMI = """#!/bin/sh
echo "NVIDIA H200, 9.0, 143771, 550.54.15"
"""


def test_an_unknown_cuda_library_is_refused() -> None:
    with pytest.raises(DeployError, match="no CUDA library is called 'opencl'") as raised:
        open_cuda("opencl")
    assert all(name in raised.value.hint for name in LIBRARIES)


class OnDevice:
    """An array of some other library, by its interface."""

    def __init__(self, shape: tuple[int, ...], typestr: str, strides: tuple[int, ...] | None = None) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (0x7F00, False),
            "strides": strides,
            "version": 3,
        }


def test_an_array_of_another_library_is_borrowed_without_a_copy() -> None:
    array = OnDevice((2, 3, 4, 4), "<f2", (96, 32, 8, 2))
    borrowed = DeviceArray.borrow(array)
    assert (borrowed.pointer, borrowed.shape, borrowed.dtype) == (0x7F00, (2, 3, 4, 4), np.dtype(np.float16))
    assert borrowed.nbytes == 2 * 3 * 4 * 4 * 2
    assert borrowed.owner is array
    assert DeviceArray.borrow(borrowed) is borrowed
    assert borrowed.__cuda_array_interface__["data"] == (0x7F00, False)


def test_a_transposed_array_is_refused() -> None:
    with pytest.raises(DeployError, match="not contiguous"):
        DeviceArray.borrow(OnDevice((2, 3), "<f4", (4, 8)))


def test_a_host_array_is_refused() -> None:
    with pytest.raises(DeployError, match="a ndarray is not in GPU memory"):
        DeviceArray.borrow(np.zeros(3))


def test_an_array_that_its_library_does_not_show_is_refused_with_its_reason() -> None:
    class Differentiable:
        @property
        def __cuda_array_interface__(self) -> Any:
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")

    with pytest.raises(DeployError, match=r"cannot be read: .* requires grad") as raised:
        DeviceArray.borrow(Differentiable())
    assert "detach" in raised.value.hint


def test_streams_of_every_library_become_handles() -> None:
    kinds = [type(name, (), {name: 77})() for name in ("cuda_stream", "ptr", "handle")]
    assert [stream_handle(stream) for stream in (77, *kinds)] == [77] * 4
    protocol = type("Stream", (), {"__cuda_stream__": lambda _: (0, 77)})()
    assert stream_handle(protocol) == 77


@pytest.mark.parametrize("stream", ["default", "77", 77.0, None, np.float32(77).item()])
def test_what_is_no_stream_is_refused(stream: object) -> None:
    with pytest.raises(DeployError, match="is not a CUDA stream"):
        stream_handle(stream)


def test_streams_of_cuda_bindings_become_handles() -> None:
    runtime = cuda_bindings()
    driver = pytest.importorskip("cuda.bindings.driver")
    assert stream_handle(runtime.cudaStream_t(77)) == 77
    assert stream_handle(driver.CUstream(77)) == 77
    # cuda.core's stream before it had the protocol.
    assert stream_handle(type("Stream", (), {"handle": driver.CUstream(77)})()) == 77
