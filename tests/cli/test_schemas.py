"""The JSON of every command has the form that its schema in docs/schemas promises, and no field beyond that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.records import make_record
from helpers.small_nets import make_net, name_in_layout

from repvgg_deploy.benchmark.record import write_record
from repvgg_deploy.cli.main import main
from repvgg_deploy.cli.schemas import VERSIONS

jsonschema = pytest.importorskip("jsonschema")
FOLDER = Path(__file__).parents[2] / "docs" / "schemas"
SCHEMAS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
QUICK = ["--duration", "0.05", "--iterations", "2", "--warmup", "0"]


def run(*arguments: object, status: int = 0) -> dict[str, Any]:
    """The object that a command prints with `--json`; the run of the command must end with `status`."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == status, result.output
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def check(value: dict[str, Any], name: str) -> dict[str, Any]:
    """Hold `value` to its schema, and to naming nothing that the schema does not know."""
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)
    assert not list(_unknown(value, schema, "")), "docs/schemas has no such field"
    return value


def _unknown(value: Any, schema: Any, where: str) -> Any:
    """The fields of a value that its schema does not describe."""
    if isinstance(value, dict) and isinstance(schema, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", "properties" not in schema)
        for key, item in value.items():
            if key in known:
                yield from _unknown(item, known[key], f"{where}.{key}")
            elif others is False or ("additionalProperties" not in schema and known):
                yield f"{where}.{key}"
            else:
                yield from _unknown(item, others, f"{where}.{key}")
    elif isinstance(value, list) and isinstance(schema, dict):
        for index, item in enumerate(value):
            yield from _unknown(item, schema.get("items", True), f"{where}[{index}]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, images, and the graphs of its exports."""
    path = tmp_path_factory.mktemp("schemas")
    torch.save(name_in_layout(make_net(), "official"), path / "net.pth")
    from repvgg_deploy.images.synthetic import write_image_folder

    write_image_folder(path / "images", 24, seed=5, size=32)
    return path


def export(folder: Path, *options: object) -> dict[str, Any]:
    return run("export", folder / "net.pth", "-o", folder, "--size", 32, "--engine", "none", *options)


def test_every_schema_is_one_and_has_its_version() -> None:
    assert SCHEMAS.keys() == VERSIONS.keys()
    for name, schema in SCHEMAS.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["properties"]["schema"] == {"const": f"repvgg-deploy/{name}"}
        assert schema["properties"]["version"] == {"const": VERSIONS[name]}
        assert {"schema", "version"} <= set(schema["required"])


def test_what_a_schema_forbids_is_found() -> None:
    value = {"schema": "repvgg-deploy/refit", "version": 1, "engine": "a.plan", "weights": "b.pth", "sha256": "0" * 64}
    check(value, "refit")
    with pytest.raises(jsonschema.ValidationError):
        check({**value, "sha256": 5}, "refit")
    with pytest.raises(AssertionError, match="no such field"):
        check({**value, "more": 5}, "refit")


@pytest.mark.exhaustive
def test_export_and_what_looks_at_its_graphs(folder: Path) -> None:
    check(export(folder), "export")
    assert "fp16" in check(export(folder, "--fp16"), "export")
    int8 = check(export(folder, "--int8", "--calib", folder / "images", "--recipe", "fast"), "export")
    assert int8["quantization"]["recipe"] == "fast"
    graph = check(run("inspect", folder / "net.int8.onnx"), "inspect")
    assert graph["inputs"] == [{"name": "images", "dtype": "float", "shape": ["batch", 3, 32, 32]}]
    assert graph["provenance"]["quantization"]["recipe"] == "fast"
    assert graph["provenance"]["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    check(run("inspect", folder / "net.pth"), "inspect")
    every = check(export(folder, "--all", "--calib", folder / "images", "--recipe", "fast"), "export-all")
    assert every["precisions"].keys() == {"fp32", "fp16", "int8"}
    parity = check(run("verify", folder / "net.pth", folder / "net.fp16.onnx"), "verify")
    assert parity["top1_agreement"] in (75.0, 87.5, 100.0)
    check(run("package", folder / "net.fp16.onnx", "-o", folder / "served", "--triton"), "package")
    check(run("bench", folder / "net.fp16.onnx", *QUICK), "bench")
    check(run("bench", folder / "net.fp16.onnx", "--profile", "--duration", "0.05"), "profile")
    check(run("bench", folder / "net.fp16.onnx", "--input", "jpeg", folder / "images", "--duration", 0.1), "end-to-end")
    check(run("predict", folder / "net.fp16.onnx", folder / "images", "-o", folder / "rows.jsonl"), "predict")


@pytest.mark.slow
def test_inspect_of_an_engine(tmp_path: Path) -> None:
    from helpers.engine_graphs import rtx_backend, small_onnx

    from repvgg_deploy.engine import BuildOptions, build_engine

    engine = build_engine(small_onnx(tmp_path), rtx_backend(), BuildOptions(timing_cache=False), tmp_path)
    assert check(run("inspect", engine.plan), "inspect")["kind"] == "engine"


@pytest.mark.slow
def test_qat(folder: Path) -> None:
    data = ("--data", folder / "images", "--calib", folder / "images", "--size", "32")
    value = run("qat", folder / "net.pth", *data, "--steps", "1", "--batch", "2", "-o", folder / "trained.pth")
    check(value, "qat")


@pytest.mark.slow
def test_fuse(folder: Path) -> None:
    check(run("fuse", folder / "net.pth", "-o", folder / "fused.pth"), "fuse")


def test_eval_and_a_limit_that_it_misses(folder: Path, image_folder: Path) -> None:
    options = ["eval", folder / "net.pth", "--data", image_folder, "--size", 32]
    check(run(*options), "eval")
    missed = check(run(*options, "--min-top1", 101, status=3), "eval")
    assert (missed["exit_status"], missed["images"]) == (3, 15)
    assert "below --min-top1 101" in missed["error"]


@pytest.mark.slow
def test_verify_and_limits_that_it_misses(folder: Path) -> None:
    torch.save(name_in_layout(make_net(seed=4), "official"), folder / "other.pth")
    models = ["verify", folder / "net.pth", folder / "other.pth", "--size", 32]
    for status, limits in ((3, ["--max-relative", 0.001]), (1, [])):
        missed = check(run(*models, *limits, status=status), "verify")
        assert missed["exit_status"] == status
        assert missed["relative"] > 0.001


def test_the_list_of_published_checkpoints() -> None:
    assert check(run("pull", "--list"), "pull-list")["files"]


def test_archs_and_doctor() -> None:
    check(run("archs"), "archs")
    check(run("doctor"), "doctor")
    assert check(run("doctor", "--require", "nonsense", status=1), "doctor")["hint"].startswith("one of: ")


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = make_record()
    check(json.loads(json.dumps(record)), "bench")
    write_record(record, tmp_path / "result.json")
    check(run("report", tmp_path / "result.json", "-o", tmp_path / "page.html"), "report")


@pytest.mark.exhaustive
def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    from repvgg_deploy.workflows import demo

    for name, value in {"_IMAGES": 24, "_CALIBRATION_IMAGES": 2, "_ROUNDS": 2, "_BATCH": 8}.items():
        monkeypatch.setattr(demo, name, value)
    check(run("demo"), "demo")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["inspect", "none.pth"], 1),
        (["verify", "none.pth", "none.onnx"], 1),
        (["bench"], 2),
        (["bench", "A0", "--batch", "x"], 2),
        (["export"], 2),
        (["nonsense"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_failure_is_an_object_too(arguments: list[str], status: int) -> None:
    value = check(run(*arguments, status=status), "error")
    assert value["exit_status"] == status
    assert value["error"]
    assert value["hint"]
