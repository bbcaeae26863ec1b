"""The self-test of a model repository finds what does not agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.serving.self_test import main


def add_model(repository: Path, name: str, factor: float, expected: float, has_graph: bool = True) -> None:
    """A model that multiplies `x` by `factor` into `x`'s successor, and golden files that say `expected`."""
    version = repository / name / "1"
    data = version / "test_data_set_0"
    data.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(f'name: "{name}"\n')
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"])]
    shapes = [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [2]) for tensor in "xy"]
    weights = [numpy_helper.from_array(np.float32(factor), "factor")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", shapes[:1], shapes[1:], weights), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 8
    if has_graph:
        onnx.save(model, version / "model.onnx")
    for kind, values, tensor in (("input", [1.0, 2.0], "x"), ("output", [expected, 2 * expected], "y")):
        proto = numpy_helper.from_array(np.array(values, np.float32), tensor)
        (data / f"{kind}_0.pb").write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(("expected", "status"), [(3.0, 0), (3.001, 0), (4.0, 1), (float("nan"), 1)])
def test_an_output_that_is_another_fails(
    expected: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_model(tmp_path, "net", 3.0, expected)
    assert main([str(tmp_path)]) == status
    assert ("FAILED" in capsys.readouterr().out) == bool(status)


def test_one_failure_among_others_fails(tmp_path: Path) -> None:
    add_model(tmp_path, "good", 3.0, 3.0)
    assert main([str(tmp_path)]) == 0
    add_model(tmp_path, "bad", 3.0, 3.5)
    assert main([str(tmp_path)]) == 1
    assert main([str(tmp_path), "--max-relative", "0.5"]) == 0


def export_output(path: Path, values: str, dimensions: str = "2") -> Path:
    """A file as trtexec writes it."""
    path.write_text(f'[\n  {{ "name" : "y"\n  , "dimensions" : "{dimensions}"\n  , "values" : [ {values} ]\n  }}\n]\n')
    return path


@pytest.mark.parametrize(
    ("values", "dimensions", "status"),
    [("3, 6", "2", 0), ("3.001, 6", "2", 0), ("3, 7", "2", 1), ("3, 6", "1x2", 1), ("NaN, 6", "2", 1)],
)
def test_what_trtexec_wrote_of_a_plan_is_compared(values: str, dimensions: str, status: int, tmp_path: Path) -> None:
    add_model(tmp_path, "plan", 3.0, 3.0, has_graph=False)
    exported = export_output(tmp_path / "found.json", values, dimensions)
    assert main(["--exported", str(exported), str(tmp_path / "plan" / "1")]) == status


@pytest.mark.parametrize("name", ["input_0.pb", "output_0.pb", "model.onnx", "config.pbtxt"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"\x08"])
def test_a_damaged_file_is_a_failure_on_one_line(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_model(tmp_path, "net", 3.0, 3.0)
    next(tmp_path.rglob(name)).write_bytes(content)
    status = main([str(tmp_path)])
    printed = capsys.readouterr().out
    # A config without the steps of an ensemble is that of one model.
    assert (status, "FAILED" in printed) == (
        (0, False) if name == "config.pbtxt" and content != b"\xff" * 50 else (1, True)
    )
    assert len(printed.splitlines()) <= 2


@pytest.mark.parametrize(
    "text", ["", "[", "[1]", '[{"name": "y"}]', '[{"name": "y", "dimensions": "9", "values": [1]}]']
)
def test_damaged_outputs_of_trtexec_are_a_failure(text: str, tmp_path: Path) -> None:
    add_model(tmp_path, "plan", 3.0, 3.0, has_graph=False)
    (tmp_path / "found.json").write_text(text)
    assert main(["--exported", str(tmp_path / "found.json"), str(tmp_path / "plan" / "1")]) == 1


def test_a_golden_tensor_in_another_file_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_model(tmp_path, "net", 3.0, 3.0)
    tensor = TensorProto(name="x", dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    next(tmp_path.rglob("input_0.pb")).write_bytes(tensor.SerializeToString())
    assert main([str(tmp_path)]) == 1
    assert "lies in another file" in capsys.readouterr().out


def test_nothing_that_was_run_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    add_model(tmp_path, "plan", 3.0, 3.0, has_graph=False)
    assert main([str(tmp_path)]) == 1
    assert "plan/1: not run" in capsys.readouterr().out
