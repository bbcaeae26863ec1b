"""A benchmark's result as JSON: one schema with a version, checked when it is read and when it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repvgg_deploy.benchmark.measure import Measurement
from repvgg_deploy.benchmark.statistics import Ratio
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files import stage_files

SCHEMA_NAME = "repvgg-deploy/bench"
SCHEMA_VERSION = 2

_MEASURE_AGAIN = "measure again with this version: `bench -o`"

Record = dict[str, Any]
_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))

_TOP: dict[str, tuple[type, ...]] = {
    "schema": (str,),
    "version": (int,),
    "name": (str,),
    "created": (str,),
    "machine": (dict,),
    "method": (dict,),
    "ceilings": (dict,),
    "results": (list,),
    "ratios": (list,),
}
_RESULT: dict[str, tuple[type, ...]] = {
    "group": (str,),
    "model": (str,),
    "form": (str,),
    "backend": (str,),
    "backend_version": (str,),
    "precision": (str,),
    "mode": (str,),
    "batch": (int,),
    "parameters": (int, type(None)),
    "top1": _OPTIONAL_NUMBER,
    "images_per_sec": _NUMBER,
    "latency_ms": (dict,),
    "compute_ms": _NUMBER,
    "h2d_ms": _NUMBER,
    "d2h_ms": _NUMBER,
    "enqueue_ms": _OPTIONAL_NUMBER,
    "iterations": (int,),
    "duration_s": _NUMBER,
    "unstable": (bool,),
    "warnings": (list,),
    "roofline": (dict, type(None)),
    "samples": (dict,),
}
# What results of earlier releases do not have.
_OPTIONAL_RESULT: dict[str, tuple[type, ...]] = {
    "input": (str, type(None)),
    "input_type": (str, type(None)),
    "profile": (list, type(None)),
    "notes": (list,),
}
_RATIO: dict[str, tuple[type, ...]] = {
    "group": (str,),
    "model": (str,),
    "form": (str,),
    "baseline": (str,),
    "baseline_form": (str,),
    "backend": (str,),
    "precision": (str,),
    "mode": (str,),
    "batch": (int,),
    "ratio": _NUMBER,
    "low": _NUMBER,
    "high": _NUMBER,
    "confidence": _NUMBER,
    "rounds": (int,),
}
_LATENCY = ("p50", "p90", "p95", "p99", "mean", "min", "max", "cv")


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
        DeployError: it is not; the message says where it differs first.
    """
    if not isinstance(record, dict) or "schema" not in record:
        raise DeployError(f"{name} is not a benchmark result", "give a JSON file that `bench -o` wrote")
    found = f"{record['schema']} {record.get('version')}"
    if found != f"{SCHEMA_NAME} {SCHEMA_VERSION}":
        raise DeployError(f"{name} has the schema {found}, not {SCHEMA_NAME} {SCHEMA_VERSION}", _MEASURE_AGAIN)
    _check_fields(record, _TOP, name)
    for index, result in enumerate(record["results"]):
        where = f"{name}: results[{index}]"
        known = {
            field: types for field, types in _OPTIONAL_RESULT.items() if isinstance(result, dict) and field in result
        }
        _check_fields(result, {**_RESULT, **known}, where)
        _check_fields(result["latency_ms"], dict.fromkeys(_LATENCY, _NUMBER), f"{where}.latency_ms")
        samples = result["samples"]
        counts = {sum(samples.get("round_queries", ())), len(samples.get("latency_ms", ()))}
        if counts != {result["iterations"]}:
            raise DeployError(
                f"{where} has not a sample for each of its {result['iterations']} iterations", _MEASURE_AGAIN
            )
    for index, ratio in enumerate(record["ratios"]):
        _check_fields(ratio, _RATIO, f"{name}: ratios[{index}]")
    return record


def _check_fields(values: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(values, dict):
        raise DeployError(f"{where} is no object", _MEASURE_AGAIN)
    for field, types in fields.items():
        if field not in values:
            raise DeployError(f"{where} has no {field}", _MEASURE_AGAIN)
        value = values[field]
        # A bool is an int to Python, and no number here.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise DeployError(f"{where}: {field} is {type(value).__name__}, not {types[0].__name__}", _MEASURE_AGAIN)


def read_record(path: Path) -> Record:
    """The benchmark result in a file.

    Raises:
        DeployError: the file cannot be read, or holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise DeployError(
            f"cannot read the result {path} ({error})", "give a JSON file that `bench -o` wrote"
        ) from error
    return check_record(_as_present(record), str(path))


def _as_present(record: Any) -> Any:
    """A record of version 1, which had the name and the version of the schema in an object, as one of version 2."""
    if isinstance(record, dict) and record.get("schema") == {"name": SCHEMA_NAME, "version": 1}:
        return {"schema": SCHEMA_NAME, "version": SCHEMA_VERSION, **{k: v for k, v in record.items() if k != "schema"}}
    return record


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def write_record(record: Record, path: Path) -> None:
    """Write a benchmark result, all at once or not at all; lists of samples stay on one line."""
    check_record(record)
    # A sweep goes on after each group, and may be aborted then.
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
