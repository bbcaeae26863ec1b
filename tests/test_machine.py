"""The machine record: what is in it, and that a GPU which does not answer is no failure."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from repvgg_deploy.machine import finish_machine, read_gpus, record_machine


def test_the_record_is_json_and_names_the_cpu_and_the_versions() -> None:
    machine = json.loads(json.dumps(finish_machine(record_machine())))
    assert machine["cpu"]["model"]
    assert machine["cpu"]["usable_cores"] >= 1
    assert {"torch", "onnx", "numpy"} <= machine["versions"].keys()
    assert machine["threads"]["torch"] >= 1
    assert machine["tool"]["version"]
    assert machine["after"].keys() == {"load_average", "gpus"}


class _NvmlError(Exception):
    pass


def _nvml(**answers: object) -> SimpleNamespace:
    """As much of NVML as one GPU without the functions that are not in `answers`, as an old driver is."""

    def refuse(*_: object) -> None:
        raise _NvmlError

    names = [
        "nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetTemperature",
    ]  # fmt: skip
    functions = {name: (lambda *_, value=answers[name]: value) if name in answers else refuse for name in names}
    return SimpleNamespace(
        NVMLError=_NvmlError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda _: b"GPU",
        **functions,
    )


def test_a_gpus_answers_come_in_units_of_people() -> None:
    (state,) = read_gpus(
        _nvml(
            nvmlDeviceGetPowerUsage=350_000,
            nvmlDeviceGetCurrentClocksThrottleReasons=0x4 | 0x40,
            nvmlDeviceGetMemoryInfo=SimpleNamespace(used=5, total=10),
        )
    )
    assert (state.name, state.power_w) == ("GPU", 350.0)
    assert state.throttle_reasons == ("power cap", "hardware thermal slowdown")
    assert (state.memory_used_bytes, state.memory_total_bytes) == (5, 10)


def test_what_a_gpu_does_not_answer_is_none() -> None:
    (state,) = read_gpus(_nvml())
    assert state.sm_clock_mhz is state.power_w is state.temperature_c is None
    assert state.throttle_reasons == ()


def test_the_names_of_nvml_are_the_librarys() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name in vars(_nvml()):
        assert hasattr(pynvml, name)
