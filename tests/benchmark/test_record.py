"""The schema of results: what is recorded in `bench/results` has it, and what has not is told so."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.damage import Place, find, places, replaced, truncated, without, wrong_for
from helpers.records import make_record

from repvgg_deploy.benchmark.record import SCHEMA_NAME, SCHEMA_VERSION, check_record, read_record, write_record
from repvgg_deploy.benchmark.statistics import compare_rates
from repvgg_deploy.errors import DeployError


def is_bench(path: Path) -> bool:
    """Other scripts of `bench/` keep their results in the same folder, each with a schema of its own."""
    schema = json.loads(path.read_text(encoding="utf-8")).get("schema")
    # Version 1 had an object there.
    return schema == SCHEMA_NAME or (isinstance(schema, dict) and schema.get("name") == SCHEMA_NAME)


RESULTS = [path for path in sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json")) if is_bench(path)]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_recorded_result_has_the_schema(path: Path) -> None:
    record = read_record(path)
    assert record["results"]
    assert record["machine"]["cpu"]["model"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_recorded_ratio_follows_from_the_recorded_samples(path: Path) -> None:
    record = read_record(path)
    keys = ("group", "backend", "precision", "mode", "batch")
    by_model = {
        (*(r[key] for key in keys), r["model"], r["form"]): (
            [r["batch"] * queries for queries in r["samples"]["round_queries"]],
            r["samples"]["round_seconds"],
        )
        for r in record["results"]
    }
    for ratio in record["ratios"]:
        where = tuple(ratio[key] for key in keys)
        mine = by_model[(*where, ratio["model"], ratio["form"])]
        theirs = by_model[(*where, ratio["baseline"], ratio["baseline_form"])]
        again = compare_rates(*mine, *theirs)
        found = (ratio["ratio"], ratio["low"], ratio["high"])
        assert found == pytest.approx((again.value, again.low, again.high), rel=1e-4)


def test_the_schema_has_this_version() -> None:
    """A change of what a result must hold needs a new version, and this line."""
    assert (SCHEMA_NAME, SCHEMA_VERSION) == ("repvgg-deploy/bench", 2)
    # Optional: results of earlier releases are read without it.
    fields = set(make_record()["results"][0]) - {"input", "input_type", "profile", "notes"}
    assert fields == {
        "group", "model", "form", "backend", "backend_version", "precision", "mode", "batch", "parameters", "top1",
        "images_per_sec", "latency_ms", "compute_ms", "h2d_ms", "d2h_ms", "enqueue_ms", "iterations", "duration_s",
        "unstable", "warnings", "roofline", "samples",
    }  # fmt: skip


def test_a_record_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    record = make_record()
    write_record(record, tmp_path / "result.json")
    assert read_record(tmp_path / "result.json") == json.loads(json.dumps(record))


def test_samples_stay_on_one_line(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "result.json")
    lines = (tmp_path / "result.json").read_text(encoding="utf-8").splitlines()
    samples = [line for line in lines if '"latency_ms": [' in line]
    assert len(samples) == len(make_record()["results"])
    assert all(line.rstrip(",").endswith("]") for line in samples)


def test_nan_is_no_number_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_record(make_record(), path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"duration_s": ', '"duration_s": NaN, "was": ', 1), encoding="utf-8")
    with pytest.raises(DeployError, match=r"cannot read the result .*result.json: JSON is malformed"):
        read_record(path)


def drop(field: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["results"][0].pop(field)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(version=99), "bench 99, not repvgg-deploy/bench 2"),
        (lambda r: r.pop("machine"), "missing field `machine`"),
        (drop("images_per_sec"), r"results\[0\]: missing field `images_per_sec`"),
        (lambda r: r["results"][0].update(batch="1"), r"batch: Expected `int`, got `str`"),
        (lambda r: r["results"][0].update(iterations=True), r"iterations: Expected `int`, got `bool`"),
        (lambda r: r["results"][0]["latency_ms"].pop("p99"), r"latency_ms: missing field `p99`"),
        (lambda r: r["results"][0]["samples"]["latency_ms"].pop(), "sample for each"),
        (lambda r: r["ratios"][0].pop("low"), r"ratios\[0\]: missing field `low`"),
    ],
)
def test_a_damaged_record_is_refused(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    record = copy.deepcopy(make_record())
    damage(record)
    with pytest.raises(DeployError, match=message):
        check_record(record)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"7",
        b"[" * 100_000,
        b'{"schema": ' + b"9" * 5000 + b"}",
        b'{"name": "\\ud800"}',
        b"\xff",
        b"Infinity",
    ],
    ids=["nothing", "a list", "a number", "deep", "5,000 digits", "a lone surrogate", "no UTF-8", "Infinity"],
)
def test_a_file_that_is_no_record_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(DeployError, match="result") as raised:
        read_record(path)
    assert raised.value.hint
    assert raised.value.message.isprintable()


def typed_places() -> list[Place]:
    """Each field that tables and plots depend on; the rest of the machine and of the method is said as it is."""
    free = {("machine", name) for name in make_record()["machine"]} - {
        ("machine", name) for name in ("cpu", "gpus", "versions")
    }
    known = {"model", "usable_cores", "flags"}
    return [
        place
        for place in places(make_record())
        if place[:2] not in free and (place[:2] != ("machine", "cpu") or len(place) == 2 or place[2] in known)
        if (place[0] != "method" or len(place) == 1) and place[-1] not in ("input", "input_type")
    ]


@pytest.mark.parametrize("place", typed_places(), ids=lambda place: ".".join(map(str, place)))
def test_each_field_of_a_record_is_what_tables_and_plots_need(place: Place) -> None:
    record = json.loads(json.dumps(make_record()))
    value = find(record, place)
    for wrong in wrong_for(value):
        if wrong is None and place[-1] in ("parameters", "top1", "enqueue_ms", "roofline"):
            continue
        with pytest.raises(DeployError) as raised:
            check_record(replaced(record, place, wrong), "result.json")
        assert raised.value.message.startswith("result.json")
        assert raised.value.message.isprintable()
    if isinstance(place[-1], str) and place[-1] not in ("profile", "notes"):
        optional = place[-2:-1] == ("samples",) and place[-1] not in ("latency_ms", "round_queries")
        if not optional and place[:-1] not in (("ceilings",), ("machine", "versions")):
            with pytest.raises(DeployError):
                check_record(without(record, place), "result.json")


def test_a_truncated_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_record(make_record(), path)
    for content in truncated(path.read_bytes().rstrip()):
        path.write_bytes(content)
        with pytest.raises(DeployError, match="result"):
            read_record(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 3.0, "ratio": 2.0}, r"ratios\[0\] lies outside its interval"),
        ({"backend": "../../etc"}, "backend: Expected `str` matching regex"),
        ({"model": "net\nerror: forged"}, "model: Expected `str` matching regex"),
    ],
)
def test_a_ratio_that_no_plot_can_show_is_refused(changes: dict[str, Any], message: str) -> None:
    record = make_record()
    record["ratios"][0].update(changes)
    with pytest.raises(DeployError, match=message):
        check_record(record)
