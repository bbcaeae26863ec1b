"""The machine that a measurement was made on: CPU, GPU and its clocks, versions, and the commit of this tool."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import repvgg_deploy
from repvgg_deploy.hardware.cpu import memory_bytes, read_cpu, usable_cores
from repvgg_deploy.hardware.gpus import ask_nvml, find_gpus, open_nvml

# What decides how fast a CPU multiplies; the whole list is a page long and says no more.
_TELLING_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_LIBRARIES = ("numpy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings")

# NVML's clocks-event reasons (nvml.h); idling is not throttling.
_THROTTLE_REASONS = {
    0x2: "application clocks setting",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability",
}
# NVML's newer name first.
_REASON_FUNCTIONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")


@dataclass(frozen=True)
class GpuState:
    """One GPU at one moment; None if the driver does not tell.

    `throttle_reasons` are those that hold the clocks down right now.
    """

    name: str
    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None


def record_machine() -> dict[str, Any]:
    """CPU, memory, operating system, versions, and the GPUs as they are before the measurement; ready for JSON."""
    return {
        "cpu": _describe_cpu(),
        "memory_bytes": memory_bytes(),
        "os": f"{platform.system()} {platform.machine()}",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "threads": _threads(),
        "python": platform.python_version(),
        "versions": _versions(),
        "tool": {"version": repvgg_deploy.__version__, "commit": _commit()},
        "gpus": [asdict(state) for state in read_gpus()],
        "driver": find_gpus().driver or None,
    }


def finish_machine(machine: dict[str, Any], group: str, gpu_load: list[dict[str, Any]]) -> dict[str, Any]:
    """`machine` with the load and the GPUs after the measurement, under `after`, and during it, under `under_load`.

    `gpu_load` is what `GpuLoad` saw while `group` was measured.
    """
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    after = {"load_average": load, "gpus": [asdict(state) for state in read_gpus()]}
    if not gpu_load:
        return {**machine, "after": after}
    return {**machine, "after": after, "under_load": {**machine.get("under_load", {}), group: gpu_load}}


def describe_identity(machine: dict[str, Any]) -> dict[str, str]:
    """What must not change between two parts of one record."""
    return {
        "the CPU": str(machine["cpu"]["model"]),
        "the GPUs": ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none",
        "the versions": ", ".join(f"{name} {version}" for name, version in sorted(machine["versions"].items())),
    }


class GpuLoad:
    """The state of the GPUs at moments at which they have just been at work: clocks read when they idle say nothing."""

    def __init__(self) -> None:
        self._states: list[list[GpuState]] = []

    def clear(self) -> None:
        """Forget what was seen."""
        self._states = []

    def read(self) -> None:
        """Look once."""
        states = read_gpus()
        if states:
            self._states.append(states)

    def summary(self) -> list[dict[str, Any]]:
        """One object per GPU: the lowest and the median SM clock, the most power and heat, every throttle reason."""
        return [_summarize(states) for states in zip(*self._states, strict=True)]


def _summarize(states: Sequence[GpuState]) -> dict[str, Any]:
    clocks = sorted(state.sm_clock_mhz for state in states if state.sm_clock_mhz is not None)
    reasons = {reason for state in states for reason in state.throttle_reasons or ()}
    return {
        "name": states[0].name,
        "readings": len(states),
        "sm_clock_mhz": {"min": clocks[0], "median": clocks[len(clocks) // 2]} if clocks else None,
        "power_w": max((s.power_w for s in states if s.power_w is not None), default=None),
        "temperature_c": max((s.temperature_c for s in states if s.temperature_c is not None), default=None),
        "throttle_reasons": sorted(reasons),
    }


def _describe_cpu() -> dict[str, Any]:
    cpu = read_cpu()
    return {
        "model": cpu.model,
        "family_model_stepping": list(cpu.family_model_stepping),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "flags": [flag for flag in _TELLING_FLAGS if flag in cpu.flags],
        "integer_instructions": cpu.integer_instructions,
        "governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
    }


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _threads() -> dict[str, Any]:
    """Torch's threads, and what the environment says to OpenMP; ONNX Runtime takes all usable cores by itself."""
    import torch

    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    return {"torch": torch.get_num_threads(), **{name: os.environ[name] for name in names if name in os.environ}}


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | _cuda_versions()


def _cuda_versions() -> dict[str, str]:
    """Of the CUDA libraries that torch brings, which decide how fast its convolutions are."""
    import torch

    if torch.version.cuda is None:
        return {}
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}


def _commit() -> str | None:
    """The commit of a checkout, with `+` where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            # Of the package alone: documents and results do not change what is measured.
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "repvgg_deploy"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changes.strip() else "")


def read_gpus() -> list[GpuState]:
    """The state of every GPU that CUDA uses, in its order; empty if there is none."""
    nvml, _ = open_nvml()
    return [_read_gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in find_gpus().uuids]


def _read_gpu(nvml: Any, gpu: Any) -> GpuState:
    power = ask_nvml(nvml, "nvmlDeviceGetPowerUsage", gpu)
    limit = ask_nvml(nvml, "nvmlDeviceGetEnforcedPowerLimit", gpu)
    answers = (ask_nvml(nvml, function, gpu) for function in _REASON_FUNCTIONS)
    reasons = next((answer for answer in answers if answer is not None), None)
    memory = ask_nvml(nvml, "nvmlDeviceGetMemoryInfo", gpu)
    return GpuState(
        name=str(ask_nvml(nvml, "nvmlDeviceGetName", gpu)),
        sm_clock_mhz=ask_nvml(nvml, "nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_SM),
        max_sm_clock_mhz=ask_nvml(nvml, "nvmlDeviceGetMaxClockInfo", gpu, nvml.NVML_CLOCK_SM),
        # NVML counts in milliwatts.
        power_w=None if power is None else power / 1e3,
        power_limit_w=None if limit is None else limit / 1e3,
        temperature_c=ask_nvml(nvml, "nvmlDeviceGetTemperature", gpu, nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=None
        if reasons is None
        else tuple(text for bit, text in _THROTTLE_REASONS.items() if reasons & bit),
        memory_used_bytes=None if memory is None else int(memory.used),
        memory_total_bytes=None if memory is None else int(memory.total),
    )
