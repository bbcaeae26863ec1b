"""The sidecar, and the checks before a plan is given to the library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.engine_graphs import provenance
from helpers.sidecars import make_side
from hypothesis import given
from hypothesis import strategies as st

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.engine.backends import Backend, Capabilities
from repvgg_deploy.engine.inspection import inspect_engine
from repvgg_deploy.engine.loading import check_plan, load_plan
from repvgg_deploy.engine.runner import load_engine
from repvgg_deploy.engine.sidecar import (
    Sidecar,
    read_sidecar,
    require_same_gpu,
    require_same_library,
    sidecar_path,
)
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.hardware.gpus import Gpu, find_gpus

L40 = Gpu("NVIDIA L40S", "8.9", 48 << 30)
H200 = Gpu("NVIDIA H200", "9.0", 141 << 30)
ANY_GPU = Capabilities(False, True, True, False, None)
TENSORRT = Backend("tensorrt", "10.16.1.11", None, ANY_GPU)
RTX = Backend("tensorrt-rtx", "1.7.1.116", None, Capabilities(True, False, False, True, ("8.9",)))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan and its sidecar; the bytes are no engine, which none of these checks may find out."""
    path = tmp_path / "net.fp16.plan"
    path.write_bytes(bytes(range(256)) * 40)
    side = make_side(sha256=hash_file(path), size=path.stat().st_size)
    sidecar_path(path).write_text(side.to_json(), encoding="utf-8")
    return path


def change(plan: Path, **values: object) -> None:
    content = json.loads(sidecar_path(plan).read_text(encoding="utf-8"))
    sidecar_path(plan).write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.mark.slow
@given(
    gpu=st.none() | st.builds(Gpu, st.text(), st.sampled_from(["7.5", "9.0", "12.0"]), st.integers(0, 1 << 40)),
    has_provenance=st.booleans(),
    batches=st.tuples(st.integers(1, 4), st.integers(4, 9), st.integers(9, 99)),
    level=st.none() | st.integers(0, 5),
    names=st.none() | st.lists(st.text(), max_size=3).map(tuple),
    notes=st.lists(st.text(), max_size=2).map(tuple),
)
def test_a_sidecar_reads_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    gpu: Gpu | None,
    has_provenance: bool,
    batches: tuple[int, int, int],
    level: int | None,
    names: tuple[str, ...] | None,
    notes: tuple[str, ...],
) -> None:
    options = {"batch_range": batches, "optimization_level": level}
    origin = replace(provenance(Precision.INT8), class_names=names) if has_provenance else None
    side = replace(make_side(gpu=gpu, **options), provenance=origin, profile=batches, warnings=notes)
    path = tmp_path_factory.getbasetemp() / "round.plan"
    sidecar_path(path).write_text(side.to_json(), encoding="utf-8")
    assert read_sidecar(path) == side


def test_an_unchanged_plan_passes(plan: Path) -> None:
    content, side = check_plan(plan)
    assert content == plan.read_bytes()
    assert side is not None
    assert side.precision == "fp16"


def cut(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-100])


def lengthen(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes() + b"more")


def change_a_byte(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    content[5000] ^= 1
    plan.write_bytes(content)


def damage_the_sidecar(plan: Path) -> None:
    sidecar_path(plan).write_text(sidecar_path(plan).read_text(encoding="utf-8")[:200], encoding="utf-8")


TAMPERED = [
    (cut, "is cut short: 10140 bytes, but it was built with 10240"),
    (lengthen, "is longer than it was"),
    (change_a_byte, "was changed after it was built"),
    (lambda plan: sidecar_path(plan).unlink(), "has no sidecar net.fp16.plan.json"),
    (damage_the_sidecar, "cannot read the sidecar"),
    (lambda plan: change(plan, schema=99), "has the schema 99, but this release reads 1"),
    (lambda plan: change(plan, backend="other"), "backend: Invalid enum value 'other'"),
    (lambda plan: change(plan, profile=[1]), "profile: Expected `array` of length 3"),
    (lambda plan: sidecar_path(plan).write_text("[]", encoding="utf-8"), "has the schema None"),
    (lambda plan: plan.unlink(), "there is no engine"),
]


@pytest.mark.parametrize(("tamper", "said"), TAMPERED, ids=[said for _, said in TAMPERED])
def test_a_plan_that_is_not_what_was_built_is_never_deserialized(plan: Path, tamper, said: str) -> None:
    tamper(plan)
    for use in (check_plan, load_plan, inspect_engine, lambda path: load_engine(path).__enter__()):
        # Without a GPU a plan that passes the checks fails with another message: that there is none.
        with pytest.raises(DeployError, match=said) as raised:
            use(plan)
        assert raised.value.hint


def test_trust_runs_a_plan_from_elsewhere(plan: Path) -> None:
    sidecar_path(plan).unlink()
    change_a_byte(plan)
    content, side = check_plan(plan, trust=True)
    assert content == plan.read_bytes()
    assert side is None


def test_another_version_of_the_library_is_told_by_name(plan: Path) -> None:
    with pytest.raises(DeployError, match=r"built by TensorRT 10\.16\.1\.11, and TensorRT 11\.4"):
        require_same_library(plan, make_side(gpu=L40), replace(TENSORRT, version="11.4.0.106"))
    with pytest.raises(DeployError, match=r"was built by TensorRT 10\.16\.1\.11, not for TensorRT-RTX"):
        require_same_library(plan, make_side(gpu=L40), RTX)


def test_a_version_compatible_plan_runs_on_another_version(plan: Path) -> None:
    require_same_library(plan, make_side(gpu=L40, version_compatible=True), replace(TENSORRT, version="10.99"))


def test_another_gpu_architecture_is_told_by_name(plan: Path) -> None:
    with pytest.raises(DeployError, match=r"compute capability 8\.9 \(NVIDIA L40S\), this GPU has 9\.0") as raised:
        require_same_gpu(plan, make_side(gpu=L40), H200, TENSORRT)
    assert "export" in raised.value.hint


@pytest.mark.parametrize(
    ("side", "backend"),
    [
        (make_side(gpu=H200), TENSORRT),
        (make_side(gpu=L40, hardware_compatibility="ampere+"), TENSORRT),
        (make_side(gpu=None), TENSORRT),
        (make_side(gpu=L40), RTX),
    ],
    ids=["same architecture", "ampere+", "built without a GPU", "portable plans"],
)
def test_a_plan_that_may_run_passes(plan: Path, side: Sidecar, backend: Backend) -> None:
    require_same_gpu(plan, side, H200, backend)


def test_an_ampere_plan_does_not_run_on_an_older_gpu(plan: Path) -> None:
    turing = Gpu("NVIDIA T4", "7.5", 16 << 30)
    with pytest.raises(DeployError, match="compute capability"):
        require_same_gpu(plan, make_side(gpu=L40, hardware_compatibility="ampere+"), turing, TENSORRT)


def test_a_tensorrt_rtx_plan_runs_on_what_it_was_built_for(plan: Path) -> None:
    turing = Gpu("NVIDIA T4", "7.5", 16 << 30)
    require_same_gpu(plan, make_side(compute_capabilities=("7.5",)), turing, RTX)
    with pytest.raises(DeployError, match=r"8\.0 and later, this GPU has 7\.5 \(NVIDIA T4\)") as raised:
        require_same_gpu(plan, make_side(), turing, RTX)
    assert "--compute-capability 7.5" in raised.value.hint
    with pytest.raises(DeployError, match=r"compute capability 7\.5, this GPU has 8\.9"):
        require_same_gpu(plan, make_side(compute_capabilities=("7.5",)), L40, RTX)


def test_a_plan_without_weights_says_how_to_put_them_in(plan: Path) -> None:
    change(plan, has_weights=False)
    with pytest.raises(DeployError, match="built without weights") as raised:
        load_plan(plan)
    assert "refit" in raised.value.hint


@pytest.mark.skipif(bool(find_gpus().gpus), reason="this machine has a GPU")
def test_inspecting_without_a_gpu_tells_what_the_sidecar_says(plan: Path) -> None:
    report = inspect_engine(plan)
    assert report.layers is None
    assert report.why_no_layers
    assert report.to_dict()["convolutions"] == {"fp16": 22}


HOSTILE = {
    "deep": b"[" * 100_000,
    "deep inside": b'{"schema": 1, "seconds": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001,
    "5,000 digits": b'{"schema": ' + b"9" * 5000 + b"}",
    "Infinity": b'{"schema": 1, "bytes": Infinity}',
    "a lone surrogate": b'{"schema": 1, "sha256": "\\ud800"}',
    "no UTF-8": b'{"schema": 1, "sha256": "\xff"}',
    "nothing": b"",
    "another value": b"7",
    "another type": b'{"schema": {"name": "x"}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_sidecar_is_one_clear_error(kind: str, plan: Path) -> None:
    sidecar_path(plan).write_bytes(HOSTILE[kind])
    with pytest.raises(DeployError, match="the sidecar") as raised:
        read_sidecar(plan)
    assert raised.value.hint
    assert raised.value.message.isprintable()
    assert len(raised.value.message) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", 5),
        ("bytes", True),
        ("bytes", 1.5),
        ("gpu", {"name": "x"}),
        ("profile", ["1", 2, 3]),
        ("inputs", [{"name": "images", "dtype": "float32", "shape": "everything"}]),
        ("options", {"batch_range": [1]}),
        ("convolutions", {"fp16": "22"}),
        ("provenance", {"sha256": "0"}),
        ("warnings", "one"),
        ("has_weights", "yes"),
        ("seconds", None),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object, plan: Path) -> None:
    change(plan, **{field: value})
    with pytest.raises(DeployError, match=rf"net\.fp16\.plan\.json: {field}"):
        read_sidecar(plan)
