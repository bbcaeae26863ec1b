"""The GPUs of this machine and their driver, as NVIDIA's management library (NVML) tells, in CUDA's order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU; `compute_capability` is written `9.0`."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class FoundGpus:
    """The GPUs that CUDA uses, in its order; `reason` says why there is none.

    `driver` is the driver's own version, `cuda` the newest CUDA that it supports; empty if unknown. `uuids` name the
    GPUs to NVML, whose own numbers are not CUDA's.
    """

    gpus: tuple[Gpu, ...]
    reason: str = ""
    driver: str = ""
    cuda: str = ""
    uuids: tuple[str, ...] = ()


@cache
def find_gpus() -> FoundGpus:
    """The GPUs of this machine; never fails."""
    nvml, reason = open_nvml()
    if nvml is None:
        return FoundGpus((), reason)
    try:
        return _list_gpus(nvml)
    except nvml.NVMLError as error:
        return FoundGpus((), f"NVML does not list the GPUs ({error})")


@cache
def open_nvml() -> tuple[Any, str]:
    """The module pynvml, initialized for the life of the process; or None, and why there is none."""
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py, which lists the GPUs, is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        if Path("/proc/driver/nvidia/version").exists():
            # A container whose NVIDIA_DRIVER_CAPABILITIES lack `utility` has the driver without this library.
            return None, "the NVIDIA driver is installed without libnvidia-ml.so.1 (containers: capability `utility`)"
        return None, "no NVIDIA driver is installed"
    except pynvml.NVMLError as error:
        return None, f"the NVIDIA driver does not respond ({error})"
    return pynvml, ""


def ask_nvml(nvml: Any, function: str, *arguments: Any) -> Any:
    """What an NVML function says; None if this GPU, driver or release does not answer it."""
    try:
        answer = getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None
    # Releases of nvidia-ml-py before 11.515 give bytes.
    return answer.decode(errors="replace") if isinstance(answer, bytes) else answer


def _list_gpus(nvml: Any) -> FoundGpus:
    driver = ask_nvml(nvml, "nvmlSystemGetDriverVersion") or ""
    version = ask_nvml(nvml, "nvmlSystemGetCudaDriverVersion_v2") or 0
    # CUDA writes 13.1 as 13010.
    cuda = f"{version // 1000}.{version % 1000 // 10}" if version else ""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    uuids = tuple(str(ask_nvml(nvml, "nvmlDeviceGetUUID", handle)) for handle in handles)
    if not uuids:
        return FoundGpus((), "NVML lists no GPU", driver, cuda)
    seen, reason = _ask_cuda(uuids)
    gpus = tuple(_describe(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in seen)
    return FoundGpus(gpus, reason, driver, cuda, seen)


def _describe(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = ask_nvml(nvml, "nvmlDeviceGetMemoryInfo", handle)
    name = str(ask_nvml(nvml, "nvmlDeviceGetName", handle))
    return Gpu(name, f"{major}.{minor}", 0 if memory is None else int(memory.total))


def _ask_cuda(listed: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The UUIDs of the GPUs that CUDA uses, in its order, or why it uses none.

    CUDA numbers by speed, NVML by bus; what is hidden from this process NVML lists as well. Where CUDA's bindings are
    not installed, or are for a newer CUDA than the driver's, the environment decides, as it does for CUDA.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        return choose_visible(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))
    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
        return choose_visible(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if status != runtime.cudaError_t.cudaSuccess:
        return (), _explain(runtime, status)
    seen = []
    for index in range(count):
        status, properties = runtime.cudaGetDeviceProperties(index)
        if status != runtime.cudaError_t.cudaSuccess:
            return (), _explain(runtime, status)
        seen.append(_write_uuid(bytes(properties.uuid.bytes), listed))
    return tuple(seen), "" if seen else "CUDA sees no GPU"


def _explain(runtime: Any, status: Any) -> str:
    _, text = runtime.cudaGetErrorString(status)
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _write_uuid(raw: bytes, listed: Sequence[str]) -> str:
    """Sixteen bytes as NVML writes them; a part of a GPU (MIG), which it does not list, has a prefix of its own."""
    digits = raw[:16].hex()
    text = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return f"GPU-{text}" if f"GPU-{text}" in listed else f"MIG-{text}"


def choose_visible(listed: tuple[str, ...], visible: str | None) -> tuple[tuple[str, ...], str]:
    """The UUIDs that `visible`, the value of CUDA_VISIBLE_DEVICES, lets a process see; or why there are none.

    As CUDA reads it: an entry is a number or the start of a UUID, and what follows one that names no GPU does not
    count.
    """
    if visible is None:
        return listed, ""
    seen: list[str] = []
    for entry in visible.split(","):
        word = entry.strip()
        found = [listed[int(word)]] if word.isdecimal() and int(word) < len(listed) else []
        if word.startswith(("GPU-", "MIG-")):
            found = [uuid for uuid in listed if uuid.startswith(word)] or ([word] if word.startswith("MIG-") else [])
        if len(found) != 1 or found[0] in seen:
            break
        seen.append(found[0])
    return tuple(seen), "" if seen else f"CUDA_VISIBLE_DEVICES={visible} hides every GPU"
