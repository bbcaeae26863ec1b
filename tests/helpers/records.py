"""A benchmark record that is made up, so that its figures are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from repvgg_deploy.benchmark.measure import Label, Measurement, Query, Slice
from repvgg_deploy.benchmark.record import (
    SCHEMA_NAME,
    SCHEMA_VERSION,
    describe_measurement,
    describe_ratio,
)
from repvgg_deploy.hardware.machine import record_machine

SPEEDS = {
    "RepVGG-A0": (4.0, 72.41),
    "RepVGG-A2": (15.0, 76.48),
    "RepVGG-B1g4": (21.0, 77.58),
    "ResNet-50": (12.0, 76.31),
}


def make_measurement(
    model: str, ms: float, batch: int, form: str = "deploy", backend: str = "torch-cpu"
) -> Measurement:
    label = Label(model, backend, "1.0", "fp32", batch, form)
    generator = np.random.default_rng(len(model) + batch)
    times = ms * batch * generator.uniform(0.99, 1.01, 12)
    return Measurement(label, tuple(Slice((Query(n, n + t / 1e3, t),)) for n, t in enumerate(times)))


def make_record() -> dict[str, Any]:
    results, ratios = [], []
    for batch in (1, 8):
        group = f"batch {batch}"
        measured = {model: make_measurement(model, ms, batch) for model, (ms, _) in SPEEDS.items()}
        training = make_measurement("RepVGG-A0", 7.0, batch, "training")
        point = {
            "tflops": 0.1 * batch,
            "flops_per_byte": 50.0 * batch,
            "attainable_tflops": 1.0,
            "share": 0.1,
            "bound": "compute",
        }
        for model, measurement in measured.items():
            results.append(describe_measurement(measurement, group, 1000, SPEEDS[model][1], point))
            baseline = measured["ResNet-50"]
            ratios.append(describe_ratio(measurement, baseline, measurement.ratio_to(baseline), group))
        results.append(describe_measurement(training, group, 1200, 72.41, None))
        fused = measured["RepVGG-A0"]
        ratios.append(describe_ratio(fused, training, fused.ratio_to(training), group))
    return {
        "schema": SCHEMA_NAME,
        "version": SCHEMA_VERSION,
        "name": "made <up>",
        "created": "2026-01-02T03:04:05+00:00",
        "machine": record_machine(),
        "method": {"warmup_s": 0.2},
        "ceilings": {"cpu fp32": {"flops_per_sec": 1e12, "bytes_per_sec": 2e10, "source": ""}},
        "results": results,
        "ratios": ratios,
    }
