"""The GPUs of a machine: NVML's facts in CUDA's order, and a reason where there is none."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.nvml import UUIDS, install_nvml, make_nvml

from repvgg_deploy.hardware import gpus
from repvgg_deploy.hardware.gpus import choose_visible, find_gpus, open_nvml


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    """NVIDIA's bindings of the CUDA runtime; two GPUs, which NVML lists in this order."""
    install_nvml(
        monkeypatch, make_nvml("slow", "fast", nvmlDeviceGetMemoryInfo=SimpleNamespace(total=141 << 30, used=0))
    )
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda.bindings (cuda-python) is not installed")


def answer(monkeypatch: pytest.MonkeyPatch, runtime: Any, count: tuple[Any, int], *uuids: str) -> None:
    """Let the CUDA runtime give these answers."""
    success = runtime.cudaError_t.cudaSuccess
    raw = [bytes.fromhex(uuid.removeprefix("GPU-").removeprefix("MIG-").replace("-", "")) for uuid in uuids]

    def properties(index: int) -> tuple[Any, Any]:
        if not raw:
            return runtime.cudaError_t.cudaErrorECCUncorrectable, None
        return success, SimpleNamespace(uuid=SimpleNamespace(bytes=raw[index]))

    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: count)
    monkeypatch.setattr(runtime, "cudaGetDeviceProperties", properties)


def test_cudas_first_gpu_comes_first_whatever_nvmls_order_is(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> None:
    answer(monkeypatch, runtime, (runtime.cudaError_t.cudaSuccess, 2), UUIDS[1], UUIDS[0])
    found = find_gpus.__wrapped__()
    assert [gpu.name for gpu in found.gpus] == ["fast", "slow"]
    assert found.uuids == (UUIDS[1], UUIDS[0])
    assert (found.gpus[0].compute_capability, found.gpus[0].memory_bytes) == ("9.0", 141 << 30)


def test_a_gpu_that_is_hidden_from_cuda_is_not_listed(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> None:
    answer(monkeypatch, runtime, (runtime.cudaError_t.cudaSuccess, 1), UUIDS[1])
    assert [gpu.name for gpu in find_gpus.__wrapped__().gpus] == ["fast"]
    answer(monkeypatch, runtime, (runtime.cudaError_t.cudaErrorNoDevice, 0))
    found = find_gpus.__wrapped__()
    assert not found.gpus
    assert "no CUDA-capable device" in found.reason


def test_a_driver_that_is_too_old_for_the_bindings_hides_no_gpu(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answer(monkeypatch, runtime, (runtime.cudaError_t.cudaErrorInsufficientDriver, 0))
    found = find_gpus.__wrapped__()
    assert found.uuids == UUIDS
    assert (found.driver, found.cuda) == ("550.54.15", "12.4")


def test_a_gpu_that_does_not_answer_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> None:
    answer(monkeypatch, runtime, (runtime.cudaError_t.cudaSuccess, 1))
    found = find_gpus.__wrapped__()
    assert not found.gpus
    assert "ECC" in found.reason
    nvml = make_nvml()
    nvml.nvmlDeviceGetCount = nvml.nvmlDeviceGetPowerUsage
    install_nvml(monkeypatch, nvml)
    assert find_gpus.__wrapped__().reason == "NVML does not list the GPUs (Not Supported)"


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, UUIDS),
        ("1,0", (UUIDS[1], UUIDS[0])),
        ("GPU-aaaa", UUIDS[1:]),
        ("0,7,1", UUIDS[:1]),
        ("0,0", UUIDS[:1]),
        ("MIG-1234", ("MIG-1234",)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
    ],
)
def test_the_environment_is_read_as_cuda_reads_it(visible: str | None, seen: tuple[str, ...]) -> None:
    found, reason = choose_visible(UUIDS, visible)
    assert found == seen
    assert bool(reason) is not bool(seen)


def test_without_a_driver_the_reason_is_that() -> None:
    if importlib.util.find_spec("pynvml") is None:
        pytest.skip("nvidia-ml-py is not installed")
    nvml, reason = open_nvml()
    if nvml is not None:
        pytest.skip("this machine has an NVIDIA driver")
    assert reason
    assert find_gpus() == gpus.FoundGpus((), reason)


def test_the_names_of_nvml_are_the_librarys() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name in vars(make_nvml()):
        assert hasattr(pynvml, name)
