"""A benchmark's result as JSON: one schema with a version, checked when it is read and when it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta

from repvgg_deploy.benchmark.measure import Measurement
from repvgg_deploy.benchmark.statistics import Ratio, TimeStatistics
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.files.typed_values import convert, parse_json, read_file

SCHEMA_NAME = "repvgg-deploy/bench"
SCHEMA_VERSION = 2

# A sweep over hundreds of cases, with all samples, takes some megabytes.
_MOST_BYTES = 256 << 20
_MEASURE_AGAIN = "measure again with this version: `bench -o`"

Record = dict[str, Any]
# What a record must hold; results of earlier releases lack what is optional here.


# Names stand in tables and plots, those that match `_ID` in the plots' file names too.
_Name = Annotated[str, Meta(max_length=4096, pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z")]
_Id = Annotated[str, Meta(max_length=64, pattern=r"\A[\w.+-]*\Z")]
_Count = Annotated[int, Meta(ge=0, le=1 << 53)]
_Batch = Annotated[int, Meta(ge=1, le=1 << 24)]
_Figure = Annotated[float, Meta(ge=0, le=1e18)]
# Logarithmic axes show these.
_Positive = Annotated[float, Meta(gt=1e-9, le=1e18)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class _Samples(msgspec.Struct):
    round_queries: list[_Count]
    latency_ms: list[_Figure]
    round_seconds: list[_Figure] = []
    compute_ms: list[_Figure] = []
    enqueue_ms: list[_Figure] = []


class _Roofline(msgspec.Struct):
    tflops: _Positive
    flops_per_byte: _Positive
    attainable_tflops: _Figure
    share: _Figure
    bound: _Name


class _Result(msgspec.Struct):
    group: _Name
    model: _Name
    form: _Id
    backend: _Id
    backend_version: _Name
    precision: _Id
    mode: _Name
    batch: _Batch
    parameters: _Count | None
    top1: Annotated[float, Meta(ge=0, le=100)] | None
    images_per_sec: _Positive
    latency_ms: TimeStatistics
    compute_ms: _Figure
    h2d_ms: _Figure
    d2h_ms: _Figure
    enqueue_ms: _Figure | None
    iterations: _Count
    duration_s: _Figure
    unstable: bool
    warnings: list[_Name]
    roofline: _Roofline | None
    samples: _Samples
    input: _Name | None = None
    input_type: _Name | None = None
    profile: tuple[_Count, _Count, _Count] | None = None
    notes: list[_Name] = []


class _Ratio(msgspec.Struct):
    group: _Name
    model: _Name
    form: _Id
    baseline: _Name
    baseline_form: _Id
    backend: _Id
    precision: _Id
    mode: _Name
    batch: _Batch
    ratio: _Positive
    low: _Positive
    high: _Positive
    confidence: _Share
    rounds: _Count


class _Ceiling(msgspec.Struct):
    flops_per_sec: _Positive
    bytes_per_sec: _Positive
    source: _Name


class _Cpu(msgspec.Struct):
    model: _Name
    usable_cores: _Count
    flags: list[_Name]


class _Gpu(msgspec.Struct):
    name: _Name


class _Machine(msgspec.Struct):
    cpu: _Cpu
    gpus: list[_Gpu]
    versions: dict[_Name, _Name]


class _Record(msgspec.Struct):
    name: _Name
    created: _Name
    machine: _Machine
    method: dict[_Name, Any]
    ceilings: dict[Annotated[str, Meta(pattern=r"\A[\w.+-]+ [\w.+-]+\Z", max_length=64)], _Ceiling]
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
    found = f"{record['schema']!s:.60} {record.get('version')!s:.20}".encode("unicode_escape").decode()
    if found != f"{SCHEMA_NAME} {SCHEMA_VERSION}":
        raise DeployError(f"{name} has the schema {found}, not {SCHEMA_NAME} {SCHEMA_VERSION}", _MEASURE_AGAIN)
    known = convert(record, _Record, name, _MEASURE_AGAIN)
    for index, ratio in enumerate(known.ratios):
        if not ratio.low <= ratio.ratio <= ratio.high:
            raise DeployError(f"{name}: ratios[{index}] lies outside its interval", _MEASURE_AGAIN)
    for index, result in enumerate(known.results):
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
        content = read_file(path, f"the result {path}", hint, _MOST_BYTES)
    except FileNotFoundError as error:
        raise DeployError(f"cannot read the result {path}: there is no such file", hint) from error
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
