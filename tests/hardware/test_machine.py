"""The machine record: what is in it, and that a GPU which does not answer is no failure."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from helpers.nvml import UUIDS, install_nvml, make_nvml

from repvgg_deploy.hardware.machine import GpuLoad, describe_identity, finish_machine, read_gpus, record_machine


def test_the_record_is_json_and_names_the_cpu_and_the_versions() -> None:
    machine = json.loads(json.dumps(finish_machine(record_machine(), "A0 batch 1", [])))
    assert machine["cpu"]["model"]
    assert machine["cpu"]["usable_cores"] >= 1
    assert {"torch", "onnx", "numpy"} <= machine["versions"].keys()
    assert machine["threads"]["torch"] >= 1
    assert machine["tool"]["version"]
    assert machine["after"].keys() == {"load_average", "gpus"}


def test_a_gpus_answers_come_in_units_of_people(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = make_nvml(
        nvmlDeviceGetPowerUsage=350_000,
        nvmlDeviceGetCurrentClocksThrottleReasons=0x4 | 0x40,
        nvmlDeviceGetMemoryInfo=SimpleNamespace(used=5, total=10),
    )
    install_nvml(monkeypatch, nvml)
    (state,) = read_gpus()
    assert (state.name, state.power_w) == ("GPU", 350.0)
    assert state.throttle_reasons == ("power cap", "hardware thermal slowdown")
    assert (state.memory_used_bytes, state.memory_total_bytes) == (5, 10)


def test_what_a_gpu_does_not_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml(monkeypatch, make_nvml())
    (state,) = read_gpus()
    assert state.sm_clock_mhz is state.power_w is state.temperature_c is None
    assert state.throttle_reasons is None


def test_what_the_driver_does_not_tell_is_not_no_throttling(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml(monkeypatch, make_nvml())
    (state,) = read_gpus()
    assert state.throttle_reasons is None
    install_nvml(monkeypatch, make_nvml(nvmlDeviceGetCurrentClocksThrottleReasons=1))
    (free,) = read_gpus()
    assert free.throttle_reasons == ()


def test_the_gpus_of_a_record_are_those_that_cuda_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml(monkeypatch, make_nvml("slow", "fast"), UUIDS[1:])
    assert [state.name for state in read_gpus()] == ["fast"]


def test_the_load_is_the_lowest_clock_and_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, reasons = iter((1980, 1500, 1755)), iter((0x1, 0x4, 0x20))
    nvml = make_nvml(nvmlDeviceGetPowerUsage=690_000)
    nvml.nvmlDeviceGetClockInfo = lambda *_: next(clocks)
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda *_: next(reasons)
    install_nvml(monkeypatch, nvml)
    load = GpuLoad()
    for _ in range(3):
        load.read()
    (gpu,) = load.summary()
    assert gpu["sm_clock_mhz"] == {"min": 1500, "median": 1755}
    assert gpu["throttle_reasons"] == ["power cap", "software thermal slowdown"]
    assert (gpu["readings"], gpu["power_w"]) == (3, 690.0)
    install_nvml(monkeypatch, make_nvml())
    machine = finish_machine(finish_machine(record_machine(), "a", [gpu]), "b", [gpu])
    assert machine["under_load"] == {"a": [gpu], "b": [gpu]}
    load.clear()
    assert load.summary() == []


def test_another_gpu_or_version_is_another_machine() -> None:
    machine = record_machine()
    other = {**machine, "versions": {**machine["versions"], "torch": "1.0"}}
    assert describe_identity(machine) != describe_identity(other)
    gpu = {**machine, "gpus": [{"name": "NVIDIA H200"}]}
    assert describe_identity(gpu)["the GPUs"] == "NVIDIA H200"
