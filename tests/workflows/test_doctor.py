"""What `doctor` says of this machine agrees with what is tried here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from repvgg_deploy.engine.backends import Backend, import_backend
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.gpus import find_gpus
from repvgg_deploy.workflows.doctor import Row, probe_machine, require_parts

ROWS = {row.part: row for row in probe_machine()}


def test_every_part_is_told() -> None:
    assert {"machine", "gpu", "tensorrt", "tensorrt-rtx", "cuda.bindings", "pycuda", "onnxruntime", "torch"} <= set(
        ROWS
    )


def test_what_is_missing_comes_with_a_hint() -> None:
    assert all(row.hint for row in ROWS.values() if row.missing)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_backend_is_told_as_it_is(name: str) -> None:
    backend = import_backend(name)  # type: ignore[arg-type]
    row = ROWS[name]
    if isinstance(backend, Backend):
        assert row.version == backend.version
        assert row.can_build is (backend.capabilities.builds_without_gpu or bool(find_gpus().gpus))
    else:
        assert (row.can_build, row.can_run, row.missing) == (False, False, backend.reason)
    if not find_gpus().gpus:
        assert row.can_run is False


def test_onnxruntime_is_told_with_its_providers() -> None:
    assert "cpu" in ROWS["onnxruntime"].detail


@pytest.mark.parametrize("name", ["simplejpeg", "pyarrow", "pooch", "ray"])
def test_an_optional_library_is_told_with_the_extra_that_brings_it(name: str) -> None:
    row = ROWS[name]
    if importlib.util.find_spec(name) is not None:
        assert (row.can_run, row.version) == (True, importlib.metadata.version(name))
        return
    assert (row.can_run, row.missing) == (False, f"No module named {name!r}")
    extra = re.fullmatch(r"pip install 'repvgg-deploy\[(\w+)\]'", row.hint)
    assert extra is not None
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    needs = tomllib.loads(text)["project"]["optional-dependencies"][extra[1]]
    assert any(need.startswith(name) for need in needs)


def test_a_required_part_that_is_missing_fails() -> None:
    rows = [Row("tensorrt", "", "TensorRT", False, False, "TensorRT is not installed", "pip install it")]
    with pytest.raises(DeployError, match="tensorrt cannot be used here: TensorRT is not installed") as raised:
        require_parts(rows, ("tensorrt",))
    assert raised.value.hint == "pip install it"


def test_a_required_backend_must_build_here() -> None:
    require_parts([Row("tensorrt-rtx", "1.7", "TensorRT-RTX", True, False, "no GPU", "get one")], ("tensorrt-rtx",))


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(DeployError, match="there is no part 'toaster'"):
        require_parts(list(ROWS.values()), ("toaster",))


def test_rows_are_plain_data() -> None:
    assert ROWS["machine"].to_dict()["part"] == "machine"
