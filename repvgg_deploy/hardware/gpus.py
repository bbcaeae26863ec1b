"""The GPUs of this machine and their driver: asked from cuda.bindings, else from nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU; `compute_capability` is written `9.0`."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class FoundGpus:
    """The GPUs that CUDA sees, in its order; `reason` says why there is none.

    `driver` is the driver's own version, `cuda` the newest CUDA that it supports; empty where unknown.
    """

    gpus: tuple[Gpu, ...]
    reason: str = ""
    driver: str = ""
    cuda: str = ""


@cache
def find_gpus() -> FoundGpus:
    """The GPUs of this machine; never fails."""
    smi = _ask_nvidia_smi()
    found = _ask_cuda(smi.gpus)
    if found is None:
        return smi
    return FoundGpus(found.gpus, found.reason, smi.driver, found.cuda)


def _ask_cuda(listed: tuple[Gpu, ...]) -> FoundGpus | None:
    """What the CUDA runtime sees; None where its Python bindings are not installed.

    Where the bindings are for a newer CUDA than the driver's they see nothing, and `listed` is what there is: TensorRT
    and pycuda may well fit that driver.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    _, version = runtime.cudaDriverGetVersion()
    cuda = f"{version // 1000}.{version % 1000 // 10}" if version else ""
    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver and version and listed:
        return FoundGpus(listed, cuda=cuda)
    if status != runtime.cudaError_t.cudaSuccess:
        return FoundGpus((), _explain(runtime, status, version), cuda=cuda)
    gpus = []
    for index in range(count):
        status, properties = runtime.cudaGetDeviceProperties(index)
        if properties is None:
            return FoundGpus((), _explain(runtime, status, version), cuda=cuda)
        name = properties.name.split(b"\0")[0].decode(errors="replace")
        gpus.append(Gpu(name, f"{properties.major}.{properties.minor}", int(properties.totalGlobalMem)))
    return FoundGpus(tuple(gpus), "" if gpus else "CUDA sees no GPU", cuda=cuda)


def _explain(runtime: Any, status: Any, driver_version: int) -> str:
    if driver_version == 0:
        return "no NVIDIA driver is installed"
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
        _, needed = runtime.cudaRuntimeGetVersion()
        return (
            f"the NVIDIA driver is too old: it supports CUDA {driver_version // 1000}.{driver_version % 1000 // 10}, "
            f"cuda.bindings is for {needed // 1000}.{needed % 1000 // 10}"
        )
    _, text = runtime.cudaGetErrorString(status)
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _ask_nvidia_smi() -> FoundGpus:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return FoundGpus((), "no NVIDIA driver is installed")
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        asked = subprocess.run(
            [tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return FoundGpus((), f"nvidia-smi does not answer ({type(error).__name__})")
    if asked.returncode != 0:
        said = (asked.stdout + asked.stderr).strip().splitlines()
        return FoundGpus((), f"nvidia-smi: {said[0] if said else f'exit status {asked.returncode}'}")
    rows = [[cell.strip() for cell in line.split(",")] for line in asked.stdout.splitlines() if line.count(",") >= 3]
    gpus = tuple(Gpu(row[0], row[1], int(row[2]) << 20 if row[2].isdigit() else 0) for row in rows)
    return FoundGpus(gpus, "" if gpus else "nvidia-smi lists no GPU", rows[0][3] if rows else "")
