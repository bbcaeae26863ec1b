"""Runs the ONNX files of a Triton model repository on the inputs beside them, and compares with the outputs there.

    python self_test.py [--max-relative X] [MODEL_REPOSITORY]
    python self_test.py --exported FILE MODEL_REPOSITORY/NAME/VERSION

The second compares what `trtexec --exportOutput=FILE` wrote of a plan. It needs numpy and onnx, the first onnxruntime
as well, and nothing else. Exit status 0: all agree; 1: one does not, or none was run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


def load_tensors(folder: Path, kind: str) -> dict[str, Any]:
    """The tensors `input_*.pb` or `output_*.pb` of a folder, by name."""
    protos = [onnx.TensorProto.FromString(path.read_bytes()) for path in sorted(folder.glob(f"{kind}_*.pb"))]
    if any(proto.data_location == onnx.TensorProto.EXTERNAL for proto in protos):
        raise ValueError("a golden tensor lies in another file")
    return {proto.name: numpy_helper.to_array(proto) for proto in protos}


def difference(expected: Any, actual: Any) -> float:
    """‖actual − expected‖ / ‖expected‖; infinite where the shapes or types differ, or where one is no number."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    found = float(np.linalg.norm(b - a) / max(float(np.linalg.norm(a)), np.finfo(np.float64).tiny))
    return found if np.isfinite(found) else float("inf")


def run_onnx(path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a graph on the CPU, by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def find_graphs(version: Path) -> list[Path]:
    """The graph in a version's folder; of an ensemble those of its steps, of the same version."""
    model = version.parent
    # By its text, so that this file needs nothing of Triton.
    steps = re.findall(r'^ *model_name: "([^"]+)"', (model / "config.pbtxt").read_text(encoding="utf-8"), re.MULTILINE)
    return [model.parent / name / version.name / "model.onnx" for name in steps or [model.name]]


def check_folder(data: Path, max_relative: float) -> bool | None:
    """Whether the graphs of a version give the outputs in its `test_data_set_0`; None if they are not all ONNX.

    Files that cannot be read, and graphs that do not run, are a failure.
    """
    name = f"{data.parent.parent.name}/{data.parent.name}"
    try:
        return run_folder(name, data, max_relative)
    except Exception as error:  # protobuf, onnx and ONNX Runtime have no common class of exceptions
        return tell_failure(name, error)


def tell_failure(name: str, error: Exception) -> bool:
    """Print what is wrong, on one line; False."""
    said = str(error).splitlines()
    print(f"{name}: FAILED, {ascii(said[0])[1:300] if said else type(error).__name__}")
    return False


def run_folder(name: str, data: Path, max_relative: float) -> bool | None:
    """As `check_folder`, with whatever exception reading and running raise."""
    graphs = find_graphs(data.parent)
    if not all(graph.exists() for graph in graphs):
        print(f"{name}: not run, it is no ONNX graph")
        return None
    actual = load_tensors(data, "input")
    for graph in graphs:
        actual = run_onnx(graph, actual)
    return compare(name, load_tensors(data, "output"), actual, max_relative)


def compare(name: str, expected: dict[str, Any], actual: dict[str, Any], max_relative: float) -> bool:
    """Print how far the outputs differ; whether that is within the limit."""
    differences = [difference(value, actual[key]) if key in actual else float("inf") for key, value in expected.items()]
    worst = max(differences, default=float("inf"))
    print(f"{name}: {'ok' if worst <= max_relative else 'FAILED'}, differs by {worst:.1e} relative")
    return worst <= max_relative


def check_exported(version: Path, exported: Path, max_relative: float) -> bool:
    """Whether the outputs that trtexec wrote, as text, are those of a version's golden files."""
    version = version.resolve()
    try:
        return compare_exported(version, exported, max_relative)
    except Exception as error:  # as above
        return tell_failure(f"{version.parent.name}/{version.name}", error)


def compare_exported(version: Path, exported: Path, max_relative: float) -> bool:
    """As `check_exported`, with whatever exception reading raises."""
    expected = load_tensors(version / "test_data_set_0", "output")
    actual = {}
    for tensor in json.loads(exported.read_text(encoding="utf-8")):
        if tensor["name"] in expected:
            shape = [int(size) for size in re.findall(r"\d+", tensor["dimensions"])]
            actual[tensor["name"]] = np.array(tensor["values"], expected[tensor["name"]].dtype).reshape(shape)
    return compare(f"{version.parent.name}/{version.name}", expected, actual, max_relative)


def main(arguments: list[str] | None = None) -> int:
    """Check every version of every model of a repository; by default of the one that this file lies in."""
    parser = argparse.ArgumentParser(description="Compare the graphs of a model repository with their golden outputs.")
    parser.add_argument("repository", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--max-relative", type=float, default=0.02, help="largest relative difference of an output")
    parser.add_argument("--exported", type=Path, metavar="FILE", help="what trtexec --exportOutput wrote of a version")
    options = parser.parse_args(arguments)
    if options.exported is not None:
        return 0 if check_exported(options.repository, options.exported, options.max_relative) else 1
    folders = sorted(options.repository.glob("*/*/test_data_set_0"))
    results = [check_folder(folder, options.max_relative) for folder in folders]
    if True not in results:
        print(f"no graph of {options.repository} was found to agree")
    return 0 if False not in results and True in results else 1


if __name__ == "__main__":
    sys.exit(main())
