"""INT8 graphs of other tools on CPUs whose kernels saturate: noticed, said, and run exactly unless told otherwise."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers.quantized_nets import QUICK, draw_images, fused_net
from onnx import numpy_helper

from repvgg_deploy.cli.main import main
from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.hardware.cpu import read_cpu
from repvgg_deploy.quantization import quantize
from repvgg_deploy.quantization.qdq import to_qdq_onnx
from repvgg_deploy.runtime import onnxruntime as onnx_runner
from repvgg_deploy.runtime.model import open_model
from repvgg_deploy.runtime.saturation import find_saturating_layers, saturates_here


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of this project."""
    path = tmp_path_factory.mktemp("graphs") / "safe.onnx"
    net = quantize(fused_net(), [draw_images(32)], QUICK)
    write_graph(to_qdq_onnx(net, GraphOptions(32, 32), {}), path)
    return path


@pytest.fixture(scope="module")
def foreign(safe: Path) -> Path:
    """The same with one layer as other tools make them: a stem of 100 steps everywhere."""
    model = onnx.load(safe)
    (kernel,) = (item for item in model.graph.initializer if item.name == "stages.0.0.conv.weight")
    kernel.CopyFrom(numpy_helper.from_array(np.full(kernel.dims, 100, np.int8), kernel.name))
    path = safe.with_name("foreign.onnx")
    onnx.save(model, path)
    return path


@pytest.fixture
def saturating_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this CPU had no VNNI: what is looked for and said then can be tested on any."""
    monkeypatch.setattr(onnx_runner, "saturates_here", lambda: True)


@pytest.mark.slow
def test_a_graph_that_saturates_is_found_and_one_of_ours_is_not(safe: Path, foreign: Path) -> None:
    assert find_saturating_layers(safe) == ()
    assert find_saturating_layers(foreign) == ("stages.0.0.conv",)


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\nhello"])
def test_a_damaged_graph_is_left_to_whoever_opens_it(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    assert find_saturating_layers(path) == ()
    assert find_saturating_layers(tmp_path / "missing.onnx") == ()


@pytest.mark.usefixtures("saturating_cpu")
def test_a_damaged_graph_is_an_error_on_a_cpu_that_saturates_too(tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"\x08\nhello")
    with pytest.raises(GraphError, match="does not load"):
        open_model(path)


@pytest.mark.parametrize("op", ["QLinearMatMul", "MatMulInteger"])
def test_products_are_looked_at_along_the_columns_that_are_summed(op: str, tmp_path: Path) -> None:
    for transposed in (False, True):
        weight = np.zeros((8, 8), np.int8)
        # Neighbours in one filter, or in two filters that never meet.
        weight[(0, 1), (0, 0)] = 100
        weight = weight.T.copy() if transposed else weight
        inputs = ["x", "w"] if op == "MatMulInteger" else ["x", "s", "z", "w", "s", "zw", "s", "z"]
        values = {"w": weight, "s": np.float32(1), "z": np.uint8(0), "zw": np.int8(0)}
        kind = onnx.TensorProto.INT32 if op == "MatMulInteger" else onnx.TensorProto.UINT8
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(op, inputs, ["y"], name="product")],
            "g",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [4, 8])],
            [onnx.helper.make_tensor_value_info("y", kind, [4, 8])],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items() if k in inputs],
        )
        path = tmp_path / "product.onnx"
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
        assert find_saturating_layers(path) == (() if transposed else ("product",))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other CPUs add in 32 bits")
def test_whether_this_cpu_saturates_is_what_its_instructions_say() -> None:
    instructions = read_cpu().integer_instructions
    if instructions == "unknown":
        pytest.skip("the system does not tell the CPU's instructions")
    assert saturates_here() == ("without VNNI" in instructions)


def test_instructions_are_read_from_the_flags(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    for flags, expected in {
        "sse4_1 avx2 fma": "AVX2 without VNNI",
        "avx2 avx512f avx512_vnni": "AVX512-VNNI",
        "avx2 avx_vnni": "AVX-VNNI",
        "avx2 avx512_vnni amx_int8": "AMX-INT8, AVX512-VNNI",
        "sse4_1": "SSE4.1 without VNNI",
        "": "unknown",
    }.items():
        path.write_text(f"model name\t: A CPU\nflags\t\t: {flags}\n")
        assert read_cpu(path).integer_instructions == expected
        assert read_cpu(path).model == "A CPU"
    path.write_text("Features\t: fp asimd asimddp\n")
    assert read_cpu(path).integer_instructions == "NEON dot product"
    assert read_cpu(tmp_path / "none").integer_instructions == "unknown"


@pytest.mark.slow
@pytest.mark.usefixtures("saturating_cpu")
def test_a_foreign_graph_is_run_exactly_and_a_note_says_so(safe: Path, foreign: Path) -> None:
    exact, native = (open_model(foreign, exact_integers=wanted) for wanted in (True, False))
    assert "run with exact sums" in exact.notes[0]
    assert "1 layers" not in exact.notes[0]
    assert "outputs differ" in native.notes[0]
    assert open_model(safe).notes == ()


def test_nothing_is_said_where_the_cpu_does_not_saturate(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runner, "saturates_here", lambda: False)
    assert open_model(foreign).notes == ()


@pytest.mark.slow
@pytest.mark.usefixtures("saturating_cpu")
@pytest.mark.parametrize("integers", ["exact", "native"])
def test_eval_and_verify_say_how_they_ran(integers: str, safe: Path, foreign: Path, image_folder: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(
        main,
        ["eval", str(foreign), "--data", str(image_folder), "--integers", integers, "--json"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["integers"] == integers
    assert "note: sums in layer stages.0.0.conv of" in result.stderr
    result = runner.invoke(main, ["eval", str(safe), "--data", str(image_folder), "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["integers"] is None
    assert "note:" not in result.stderr
    result = runner.invoke(main, ["verify", str(foreign), str(foreign), "--integers", integers], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("note: sums in layer") == 2


@pytest.mark.slow
def test_exact_sums_are_those_of_the_torch_net_on_any_cpu(foreign: Path) -> None:
    net = quantize(fused_net(), [draw_images(32)], QUICK)
    layer = net.integer_layer("stages.0.0")
    assert layer is not None
    layer.weight.fill_(100)
    images = 2 * draw_images(8, seed=4)
    expected = net(images).numpy()
    exact = open_model(foreign).run_images(images.numpy())["logits"]
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    native = open_model(foreign, exact_integers=False).run_images(images.numpy())["logits"]
    # Without VNNI the planted layer saturates for good.
    assert saturates_here() == bool(np.abs(native - expected).max() > 1e-2 * np.abs(expected).max())


@pytest.mark.exhaustive
@pytest.mark.usefixtures("saturating_cpu")
def test_bench_marks_a_graph_whose_sums_may_saturate_and_no_other(safe: Path, foreign: Path) -> None:
    command = ["bench", str(safe), str(foreign), "--duration", "0.02", "--iterations", "2", "--warmup", "0"]
    result = CliRunner().invoke(main, [*command, "--json"])
    assert result.exit_code == 0, result.stderr
    modes = {entry["model"]: entry["mode"] for entry in json.loads(result.stdout)["results"]}
    assert modes == {"safe.onnx": "", "foreign.onnx": "sums may saturate"}
    printed = CliRunner(env={"COLUMNS": "200"}).invoke(main, command)
    marked = [line.split()[0] for line in printed.stdout.splitlines() if "sums may saturate" in line]
    assert marked == ["foreign.onnx"], printed.stdout
