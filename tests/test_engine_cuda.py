"""The CUDA interface, as far as it goes without a GPU: names, errors, arrays and streams of other libraries."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import repvgg_deploy.engine
from repvgg_deploy.engine.cuda import LIBRARIES, Cuda, DeviceArray, open_cuda, stream_handle
from repvgg_deploy.engine.gpus import find_gpus
from repvgg_deploy.errors import DeployError

ENGINE = Path(repvgg_deploy.engine.__file__).parent
without_gpu = pytest.mark.skipif(bool(find_gpus().gpus), reason="this machine has a GPU")


def cuda_bindings() -> Any:
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda.bindings (cuda-python) is not installed")


def test_every_name_of_cuda_bindings_that_is_used_exists() -> None:
    runtime = cuda_bindings()
    used = set()
    for file in ("cuda_bindings.py", "gpus.py"):
        for node in ast.walk(ast.parse((ENGINE / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "runtime":
                used.add(node.attr)
    assert len(used) > 25
    assert not [name for name in used if not hasattr(runtime, name)]


@pytest.mark.parametrize("module", ["cuda_bindings", "cuda_pycuda"])
def test_both_libraries_have_every_method_of_the_interface(module: str) -> None:
    # Read from the source: pycuda cannot be imported without a driver.
    tree = ast.parse((ENGINE / f"{module}.py").read_text(encoding="utf-8"))
    (library,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
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
        lambda cuda: cuda.create_event(),
        lambda cuda: cuda.synchronize_event(0),
        lambda cuda: cuda.begin_capture(0),
        lambda cuda: cuda.end_capture(0),
    ],
)
def test_each_call_of_cuda_bindings_reports_its_failure(call: Any) -> None:
    cuda_bindings()
    library = importlib.import_module("repvgg_deploy.engine.cuda_bindings").CudaBindings()
    with pytest.raises(DeployError, match="CUDA says CUDA driver version is insufficient"):
        call(library)


@without_gpu
def test_opening_cuda_without_a_gpu_says_why() -> None:
    with pytest.raises(DeployError, match="engines cannot run") as raised:
        open_cuda()
    assert raised.value.hint


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


def test_streams_of_every_library_become_handles() -> None:
    kinds = [type(name, (), {name: 77})() for name in ("cuda_stream", "ptr", "handle")]
    assert [stream_handle(stream) for stream in (77, *kinds)] == [77] * 4
    with pytest.raises(DeployError, match="is no CUDA stream"):
        stream_handle("default")
