"""As much of NVML as the project asks, for GPUs that are not here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from repvgg_deploy.hardware import gpus, machine

UUIDS = ("GPU-00000000-1111-2222-3333-444444444444", "GPU-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")


class NvmlError(Exception):
    """NVML's base class of errors."""


def make_nvml(*names: str, **answers: object) -> SimpleNamespace:
    """One GPU for each of `names` (by default `GPU`), without the functions that are not in `answers`."""

    def refuse(*_: object) -> None:
        raise NvmlError("Not Supported")

    names = names or ("GPU",)
    optional = [
        "nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetTemperature",
    ]  # fmt: skip
    functions = {name: (lambda *_, value=answers[name]: value) if name in answers else refuse for name in optional}
    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlSystemGetDriverVersion=lambda: "550.54.15",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 12040,
        nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda uuid: UUIDS.index(uuid),
        nvmlDeviceGetUUID=lambda handle: UUIDS[handle],
        nvmlDeviceGetName=lambda handle: names[handle].encode(),
        nvmlDeviceGetCudaComputeCapability=lambda _: (9, 0),
        **functions,
    )


def install_nvml(monkeypatch: pytest.MonkeyPatch, nvml: Any, uuids: tuple[str, ...] = UUIDS[:1]) -> None:
    """Let `find_gpus` and the machine record ask `nvml`, of which CUDA uses `uuids`."""
    monkeypatch.setattr(gpus, "open_nvml", lambda: (nvml, ""))
    monkeypatch.setattr(machine, "open_nvml", lambda: (nvml, ""))
    monkeypatch.setattr(machine, "find_gpus", lambda: gpus.FoundGpus((), uuids=uuids))
