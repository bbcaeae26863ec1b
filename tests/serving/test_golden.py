"""The golden files of a model: the same values for ONNX's tests, trtexec and programs, and commands that name them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from repvgg_deploy.serving.golden import GoldenSet

IMAGES = {"images": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)}
SCORES = {"scores": np.arange(4, dtype=np.float16).reshape(2, 2), "classes": np.arange(4, dtype=np.int64).reshape(2, 2)}


def test_raw_files_have_the_values_of_the_protobufs(tmp_path: Path) -> None:
    GoldenSet(IMAGES, SCORES, ("model.plan",)).write(tmp_path)
    folder = tmp_path / "test_data_set_0"
    for kind, tensors in (("input", IMAGES), ("output", SCORES)):
        for index, (name, values) in enumerate(tensors.items()):
            proto = onnx.TensorProto.FromString((folder / f"{kind}_{index}.pb").read_bytes())
            assert proto.name == name
            assert np.array_equal(numpy_helper.to_array(proto), values)
            raw = np.fromfile(folder / f"{kind}_{index}.bin", values.dtype.newbyteorder("<"))
            assert np.array_equal(raw, values.ravel())


def commands(tmp_path: Path, golden: GoldenSet) -> list[list[str]]:
    golden.write(tmp_path)
    text = (tmp_path / "test_data_set_0" / "README.md").read_text()
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    trtexec ")]


def test_the_commands_name_each_plan_and_files_that_are_there(tmp_path: Path) -> None:
    found = commands(tmp_path, GoldenSet(IMAGES, SCORES, ("model_7.5.plan", "model_8.9.plan")))
    assert [words[1] for words in found] == ["--loadEngine=model_7.5.plan", "--loadEngine=model_8.9.plan"] * 2
    for words in found:
        assert words[2] == "--shapes=images:2x3x2x2"
        for file in re.findall(r":(test_data_set_0/[^, ]+)", " ".join(words)):
            assert (tmp_path / file).is_file()
    # trtexec compares no int64.
    assert found[0][4:] == [
        "--loadRefOutputs=scores:test_data_set_0/output_0.bin",
        "--accuracyAlgorithm=cos",
        "--accuracyThreshold=2e-4",
    ]
    assert found[2][4:] == ["--exportOutput=found.json"]


def test_a_fixed_batch_has_no_shapes_and_a_graph_is_built_strongly_typed(tmp_path: Path) -> None:
    first, _ = commands(tmp_path, GoldenSet(IMAGES, SCORES, ("model.onnx",), dynamic_batch=False))
    assert first[1:4] == ["--onnx=model.onnx", "--stronglyTyped", "--loadInputs=images:test_data_set_0/input_0.bin"]


def test_names_with_a_colon_are_quoted(tmp_path: Path) -> None:
    first, _ = commands(tmp_path, GoldenSet({"in:0": IMAGES["images"]}, SCORES, ("model.plan",)))
    assert first[2:4] == ["--shapes='in:0':2x3x2x2", "--loadInputs='in:0':test_data_set_0/input_0.bin"]


def test_a_graph_that_tensorrt_refuses_has_no_files_for_it(tmp_path: Path) -> None:
    GoldenSet(IMAGES, SCORES).write(tmp_path)
    assert {path.suffix for path in (tmp_path / "test_data_set_0").iterdir()} == {".pb"}
