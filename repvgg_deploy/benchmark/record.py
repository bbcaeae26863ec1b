"""A benchmark's result as JSON: one schema with a version, checked when it is read and when it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from repvgg_deploy.benchmark.measure import Measurement
from repvgg_deploy.benchmark.statistics import Ratio
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files import stage_files
from repvgg_deploy.typed_values import convert, parse_json

SCHEMA_NAME = "repvgg-deploy/bench"
SCHEMA_VERSION = 2

_MEASURE_AGAIN = "measure again with this version: `bench -o`"

Record = dict[str, Any]
# What a record must hold; results of earlier releases lack what is optional here.


class _Latency(msgspec.Struct):
    p50: float
    p90: float
    p95: float
    p99: float
    mean: float
    min: float
    max: float
    cv: float


class _Samples(msgspec.Struct):
    round_queries: list[int]
    latency_ms: list[float]
    round_seconds: list[float] = []
    compute_ms: list[float] = []
    enqueue_ms: list[float] = []


class _Result(msgspec.Struct):
    group: str
    model: str
    form: str
    backend: str
    backend_version: str
    precision: str
    mode: str
    batch: int
    parameters: int | None
    top1: float | None
    images_per_sec: float
    latency_ms: _Latency
    compute_ms: float
    h2d_ms: float
    d2h_ms: float
    enqueue_ms: float | None
    iterations: int
    duration_s: float
    unstable: bool
    warnings: list[str]
    roofline: dict[str, float | str] | None
    samples: _Samples
    input: str | None = None
    input_type: str | None = None
    profile: tuple[int, int, int] | None = None
    notes: list[str] = []


class _Ratio(msgspec.Struct):
    group: str
    model: str
    form: str
    baseline: str
    baseline_form: str
    backend: str
    precision: str
    mode: str
    batch: int
    ratio: float
    low: float
    high: float
    confidence: float
    rounds: int


class _Ceiling(msgspec.Struct):
    flops_per_sec: float
    bytes_per_sec: float
    source: str


class _Record(msgspec.Struct):
    name: str
    created: str
    machine: dict[str, Any]
    method: dict[str, Any]
    ceilings: dict[str, _Ceiling]
    results: list[_Result]
    ratios: list[_Ratio]


def describe_measurement(
    measurement: Measurement,
    group: str,
    parameters: int | None,
    top1: float | None,
    roofline: Mapping[str, Any] | None,
) -> Record:
    """One entry of `results`: the figures, and every sample behind them."""
    label, queries = measurement.label, measurement.queries
    parts = {
        "latency_ms": [query.latency_ms for query in queries],
        "compute_ms": [query.compute_ms for query in queries],
        "enqueue_ms": [query.enqueue_ms for query in queries if query.enqueue_ms is not None],
    }
    if parts["compute_ms"] == parts["latency_ms"]:
        del parts["compute_ms"]
    return {
        "group": group,
        "model": label.model,
        "form": label.form,
        "backend": label.backend,
        "backend_version": label.backend_version,
        "precision": label.precision,
        "mode": label.mode,
        "batch": label.batch,
        "input": None if label.size is None else "x".join(map(str, label.size)),
        "input_type": label.input_type,
        "profile": None if label.profile is None else list(label.profile),
        "notes": list(label.notes),
        "parameters": parameters,
        "top1": top1,
        "images_per_sec": _rounded(measurement.images_per_sec),
        "latency_ms": {name: _rounded(value) for name, value in measurement.latency.to_dict().items()},
        "compute_ms": _rounded(measurement.compute.p50),
        "h2d_ms": _rounded(_median([query.h2d_ms for query in queries])),
        "d2h_ms": _rounded(_median([query.d2h_ms for query in queries])),
        "enqueue_ms": None if measurement.enqueue is None else _rounded(measurement.enqueue.p50),
        "iterations": len(queries),
        "duration_s": _rounded(measurement.duration_s),
        "unstable": measurement.unstable,
        "warnings": list(measurement.warnings),
        "roofline": None if roofline is None else dict(roofline),
        "samples": {
            "round_queries": [len(part.queries) for part in measurement.slices],
            "round_seconds": [_rounded(part.seconds) for part in measurement.slices],
            **{name: [_rounded(value) for value in values] for name, values in parts.items() if values},
        },
    }


def describe_ratio(measurement: Measurement, baseline: Measurement, ratio: Ratio, group: str) -> Record:
    """One entry of `ratios`."""
    label = measurement.label
    return {
        "group": group,
        "model": label.model,
        "form": label.form,
        "baseline": baseline.label.model,
        "baseline_form": baseline.label.form,
        "backend": label.backend,
        "precision": label.precision,
        "mode": label.mode,
        "batch": label.batch,
        "ratio": _rounded(ratio.value),
        "low": _rounded(ratio.low),
        "high": _rounded(ratio.high),
        "confidence": ratio.confidence,
        "rounds": ratio.rounds,
    }


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _rounded(value: float) -> float:
    """Six significant digits: more than any clock here has, and half the file."""
    return float(f"{value:.6g}")


def check_record(record: Any, name: str = "the result") -> Record:
    """`record`, where it is one of this schema and version.

    Raises:
        DeployError: the record does not fit the schema; the message names the first difference.
    """
    if not isinstance(record, dict) or "schema" not in record:
        raise DeployError(f"{name} is not a benchmark result", "give a JSON file that `bench -o` wrote")
    found = f"{record['schema']!s:.60} {record.get('version')!s:.20}"
    if found != f"{SCHEMA_NAME} {SCHEMA_VERSION}":
        raise DeployError(f"{name} has the schema {found}, not {SCHEMA_NAME} {SCHEMA_VERSION}", _MEASURE_AGAIN)
    for index, result in enumerate(convert(record, _Record, name, _MEASURE_AGAIN).results):
        counts = {sum(result.samples.round_queries), len(result.samples.latency_ms)}
        if counts != {result.iterations}:
            raise DeployError(
                f"{name}: results[{index}] does not have a sample for each of its {result.iterations} iterations",
                _MEASURE_AGAIN,
            )
    return cast(Record, record)


def read_record(path: Path) -> Record:
    """The benchmark result in a file.

    Raises:
        DeployError: the file cannot be read, or holds something else.
    """
    hint = "give a JSON file that `bench -o` wrote"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DeployError(f"cannot read the result {path}: {error.strerror}", hint) from error
    return check_record(_as_present(parse_json(content, f"the result {path}", hint)), str(path))


def _as_present(record: Any) -> Any:
    """A record of version 1, which had the name and the version of the schema in an object, as one of version 2."""
    if isinstance(record, dict) and record.get("schema") == {"name": SCHEMA_NAME, "version": 1}:
        return {"schema": SCHEMA_NAME, "version": SCHEMA_VERSION, **{k: v for k, v in record.items() if k != "schema"}}
    return record


def write_record(record: Record, path: Path) -> None:
    """Write a benchmark result, all at once or not at all; lists of samples stay on one line."""
    check_record(record)
    # A sweep continues after each group, and may be aborted then.
    with stage_files(path.absolute().parent, is_result=False) as staging:
        (staging / path.name).write_text(_dump(record) + "\n", encoding="utf-8")


def _dump(value: Any, indent: str = "") -> str:
    """JSON with an indent of 1, but each list of numbers on one line."""
    deeper = indent + " "
    if isinstance(value, dict) and value:
        rows = [f"{deeper}{json.dumps(str(key))}: {_dump(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f"{deeper}{_dump(item, deeper)}" for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
