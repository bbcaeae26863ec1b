"""Graphs with loops: short ones run, those that would never end are refused or ended."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from repvgg_deploy.cli.main import main
from repvgg_deploy.errors import GraphError
from repvgg_deploy.runtime import loops
from repvgg_deploy.runtime.loops import MOST_ITERATIONS, Loops, find_loops
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.runtime.session import GraphSession

PIXELS = np.zeros((2, 3, 8, 8), np.float32)
TRUE = helper.make_node("Constant", [], ["true"], value=numpy_helper.from_array(np.array(True)))


def number(name: str, value: int) -> TensorProto:
    return numpy_helper.from_array(np.array(value, np.int64), name)


def body(*inner: NodeProto, condition: str = "c", loop_over: str = "v") -> GraphProto:
    """Adds one to what it carries, after `inner`; its condition is the value called so."""
    nodes = [helper.make_node("Identity", [condition], ["c2"]), helper.make_node("Add", [loop_over, "one"], ["v2"])]
    return helper.make_graph(
        [*inner, *nodes],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v2", TensorProto.FLOAT, None),
        ],
    )


def loop(trips: str, inside: GraphProto, condition: str = "", carried: str = "flat", out: str = "logits") -> NodeProto:
    return helper.make_node("Loop", [trips, condition, carried], [out], f"loop over {out}", body=inside)


def model(*nodes: NodeProto, trips: int = 5) -> onnx.ModelProto:
    """The mean of each channel, then `nodes`, which may use the constants `trips` and `one`."""
    head = [helper.make_node("GlobalAveragePool", ["x"], ["mean"]), helper.make_node("Flatten", ["mean"], ["flat"])]
    graph = helper.make_graph(
        [*head, *nodes],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [number("trips", trips), numpy_helper.from_array(np.array(1, np.float32), "one")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def written(made: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "net.onnx"
    onnx.save(made, path)
    return path


def nested(trips: int) -> onnx.ModelProto:
    inner = loop("trips", body(), carried="v", out="w")
    return model(loop("trips", body(inner, loop_over="w")), trips=trips)


def in_a_branch(trips: int) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]
    long = helper.make_graph([loop("trips", body())], "long", [], ends)
    short = helper.make_graph([helper.make_node("Identity", ["flat"], ["logits"])], "short", [], ends)
    return model(TRUE, helper.make_node("If", ["true"], ["logits"], then_branch=long, else_branch=short), trips=trips)


def test_a_short_loop_runs_and_is_counted(tmp_path: Path) -> None:
    path = written(model(loop("trips", body()), trips=7), tmp_path)
    assert find_loops(path) == Loops(True, 7, "loop over logits")
    np.testing.assert_array_equal(OnnxRunner(path).run(PIXELS)["logits"], np.full((2, 3), 7, np.float32))
    np.testing.assert_array_equal(GraphSession(path).run({"x": PIXELS})["logits"], np.full((2, 3), 7, np.float32))


@pytest.mark.parametrize("build", [nested, in_a_branch])
def test_short_loops_inside_of_others_run(build, tmp_path: Path) -> None:
    path = written(build(4), tmp_path)
    wanted = 16 + 4 if build is nested else 4
    np.testing.assert_array_equal(OnnxRunner(path).run(PIXELS)["logits"], np.full((2, 3), wanted, np.float32))


def test_graphs_without_loops_have_none_and_what_is_no_graph_neither(tmp_path: Path) -> None:
    assert find_loops(model(helper.make_node("Identity", ["flat"], ["logits"]))) == Loops()
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    assert find_loops(tmp_path / "x.onnx") == Loops()
    assert find_loops(tmp_path / "missing.onnx") == Loops()


CONSTANT = helper.make_node("Constant", [], ["many"], value=number("", 10**15))
CONSTANT_INT = helper.make_node("Constant", [], ["many"], value_int=10**15)


@pytest.mark.parametrize(
    ("made", "often"),
    [
        (model(loop("trips", body()), trips=10**15), "1,000,000,000,000,000 times"),
        (model(CONSTANT, loop("many", body())), "1,000,000,000,000,000 times"),
        (model(CONSTANT_INT, loop("many", body())), "1,000,000,000,000,000 times"),
        (nested(10_000), "100,000,000 times"),
        (in_a_branch(10**15), "1,000,000,000,000,000 times"),
        (model(loop("", body())), "without end"),
        (model(TRUE, loop("", body(), "true")), "without end"),
        (model(loop("", body(TRUE, condition="true"))), "without end"),
        (model(TRUE, loop("", body(condition="true"), "true")), "without end"),
    ],
)
def test_a_loop_that_would_not_end_is_refused_before_it_runs(made: onnx.ModelProto, often: str, tmp_path: Path) -> None:
    path = written(made, tmp_path)
    for refused in (lambda: OnnxRunner(path), lambda: OnnxRunner(path, quick_start=True), lambda: GraphSession(made)):
        with pytest.raises(GraphError, match=rf"repeats the node loop over \w+ {often}") as raised:
            refused()
        assert "timeout" in raised.value.hint


def test_a_loop_in_a_function_is_seen() -> None:
    made = model(helper.make_node("Own", ["flat"], ["logits"], domain="own"))
    many = helper.make_node("Constant", [], ["many"], value_int=10**15)
    node = helper.make_node("Loop", ["many", "", "a"], ["b"], body=body())
    made.functions.append(helper.make_function("own", "Own", ["a"], ["b"], [many, node], [helper.make_opsetid("", 17)]))
    assert find_loops(made).found


@pytest.mark.parametrize("trips", ["", "trips"])
@pytest.mark.parametrize("condition", ["keeps", "stops"])
def test_a_loop_whose_condition_is_computed_is_not_refused(condition: str, trips: str, tmp_path: Path) -> None:
    # As exporters write `while`.
    limit = helper.make_node("Constant", [], ["limit"], value_int=3)
    checks = helper.make_node("Less", ["i", "limit"], [condition])
    path = written(model(loop(trips, body(limit, checks, condition=condition)), trips=2**63 - 1), tmp_path)
    assert find_loops(path) == Loops(True, 1, "loop over logits")
    np.testing.assert_array_equal(OnnxRunner(path).run(PIXELS)["logits"], np.full((2, 3), 4, np.float32))


@pytest.mark.parametrize("dims", [(), (1,), (2**40,)])
def test_a_damaged_number_of_trips_is_no_number(dims: tuple[int, ...]) -> None:
    made = model(loop("trips", body()))
    made.graph.initializer[0].ClearField("raw_data")
    made.graph.initializer[0].dims[:] = dims
    assert find_loops(made).iterations == 1


def test_loops_that_are_nested_beyond_all_numbers_are_infinite() -> None:
    inner = body()
    for _ in range(25):
        inner = body(loop("trips", inner, carried="v", out="w"), loop_over="w")
    assert find_loops(model(loop("trips", inner), trips=2**62)).iterations == math.inf
    assert MOST_ITERATIONS > 10_000


def computed(folder: Path) -> Path:
    """A graph whose loop is as long as its image is bright, that is endless for the images of a folder."""
    many = helper.make_node("Constant", [], ["many"], value_float=1e15)
    total = helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0)
    length = helper.make_node("Mul", ["sum", "zero"], ["nothing"])
    zero = helper.make_node("Constant", [], ["zero"], value_float=0.0)
    whole = helper.make_node("Add", ["nothing", "many"], ["whole"])
    cast = helper.make_node("Cast", ["whole"], ["length"], to=TensorProto.INT64)
    return written(model(many, zero, total, length, whole, cast, loop("length", body())), folder)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_run_of_a_loop_whose_length_is_computed_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "RUN_SECONDS", 0.3)
    path = computed(tmp_path)
    assert find_loops(path).iterations == 1
    begin = time.monotonic()
    for run in (lambda: OnnxRunner(path).run(PIXELS), lambda: GraphSession(path).run({"x": PIXELS})):
        with pytest.raises(GraphError, match=r"net.onnx has loops, and a run had not ended after 0.3 s"):
            run()
    assert time.monotonic() - begin < 30
    # Another run is not ended by what ended the first.
    short = written(model(loop("trips", body())), tmp_path)
    runner = OnnxRunner(short)
    for _ in range(2):
        assert runner.run(PIXELS)["logits"][0, 0] == 5


@pytest.mark.parametrize("kind", ["refused", "ended"])
def test_every_command_that_runs_a_graph_says_so(
    kind: str, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "RUN_SECONDS", 0.2)
    path = computed(tmp_path) if kind == "ended" else written(model(loop("trips", body()), trips=10**15), tmp_path)
    said = "has loops, and a run had not ended" if kind == "ended" else "repeats the node"
    for folder in sorted(image_folder.iterdir())[3:]:
        shutil.rmtree(folder)
    few = ("--duration", 0, "--warmup", 0, "--iterations", 1)
    for arguments in (
        ("eval", path, "--data", image_folder),
        ("predict", path, image_folder, "-o", tmp_path / "rows.csv"),
        ("verify", path, path),
        ("bench", path, *few),
        ("bench", path, "--profile", "--duration", 0),
    ):
        result = command(*arguments)
        assert result.exit_code == 1, arguments
        assert f"error: {path}" in result.stderr, (arguments, result.stderr)
        assert said in " ".join(result.stderr.split())
    assert command("inspect", path).exit_code == 0
