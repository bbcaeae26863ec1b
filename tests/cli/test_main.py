"""The command line's contract: exit codes, what goes to stdout and stderr, and nothing written on failure."""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.small_nets import make_net, name_in_layout
from PIL import Image

import repvgg_deploy
from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.cli.main import main

Save = Callable[..., Path]
NO_ENGINE = ["--engine", "none"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def object_of(result: Result) -> dict[str, Any]:
    """The one JSON object that stdout consists of."""
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def failed(result: Result) -> str:
    """What stderr says of a failure: `error: …`, then `hint: …`; on stdout nothing, or both as JSON; no traceback."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    *_, error, hint = result.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    if result.stdout:
        value = json.loads(result.stdout)
        assert (value["schema"], value["exit_status"]) == ("repvgg-deploy/error", 1)
        assert [f"error: {value['error']}", f"hint: {value['hint']}"] == [error, hint]
    return error


@pytest.fixture
def graph(checkpoint_file: Path, tmp_path: Path) -> Path:
    result = run("export", checkpoint_file, "-o", tmp_path / "made", "--size", 32, *NO_ENGINE)
    assert result.exit_code == 0, result.output
    return tmp_path / "made" / "checkpoint.fp32.onnx"


def test_export_prints_one_object_with_the_promised_keys(checkpoint_file: Path, tmp_path: Path) -> None:
    value = object_of(run("export", checkpoint_file, "-o", tmp_path / "out", "--size", 32, "--json", *NO_ENGINE))
    promised = "onnx engine arch layout form precision parameters sha256 parity seconds peak_bytes"
    assert set(promised.split()) <= value.keys()
    assert Path(value["onnx"]) == tmp_path / "out" / "checkpoint.fp32.onnx"
    assert value["sha256"] == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    assert (value["engine"], value["layout"], value["form"], value["precision"]) == (None, "official", "train", "fp32")
    for parity in value["parity"].values():
        assert parity.keys() == {"max_abs", "relative", "cosine", "top1_agreement", "images"}


def test_export_writes_one_file_and_nothing_else(graph: Path) -> None:
    assert [path.name for path in graph.parent.iterdir()] == ["checkpoint.fp32.onnx"]


def test_export_twice_gives_the_same_bytes(graph: Path, checkpoint_file: Path) -> None:
    first = graph.read_bytes()
    assert run("export", checkpoint_file, "-o", graph.parent, "--size", 32, *NO_ENGINE).exit_code == 0
    assert graph.read_bytes() == first


def test_export_names_the_file_after_the_checkpoint_and_the_precision(state, save: Save, tmp_path: Path) -> None:
    path = save(state, "net.v2.pth.tar")
    value = object_of(run("export", path, "-o", tmp_path / "out", "--size", 32, "--fp16", "--json", *NO_ENGINE))
    assert Path(value["onnx"]).name == "net.v2.fp16.onnx"


FAILURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "there is no file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-500]), "truncated or damaged"),
    "directory": (lambda path: (path.unlink(), path.mkdir()), "is a directory"),
    "other network": (lambda path: torch.save({"layer1.0.conv1.weight": torch.ones(2)}, path), "a ResNet"),
    "code": (lambda path: torch.save(torch.nn.ReLU(), path), "contains no named tensors"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("command", ["export", "fuse", "inspect", "verify", "eval"])
def test_bad_checkpoint_fails_every_command_with_error_and_hint(
    command: str, failure: str, checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    damage, message = FAILURES[failure]
    damage(checkpoint_file)
    out = tmp_path / "out"
    rest = {
        "export": ["-o", out, *NO_ENGINE],
        "fuse": ["-o", out / "fused.pth"],
        "inspect": ["--json"],
        "verify": [checkpoint_file],
        "eval": ["--data", image_folder, "--json"],
    }
    assert message in failed(run(command, checkpoint_file, *rest[command]))
    assert not out.exists()


HOSTILE = "stage9\nerror: forged\nhint: run it as root\x1b[31m"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_names_in_a_file_cannot_forge_an_error_nor_drive_the_terminal(options: list[str], save: Save) -> None:
    result = run("inspect", save({f"{HOSTILE}.weight": torch.zeros(1)}), *options)
    lines = result.output.splitlines()
    assert result.exit_code == 1
    assert sum(line.startswith(("error: ", "hint: ")) for line in result.stderr.splitlines()) == 2
    assert not [line for line in lines if line.startswith("error: forged") or not line.isprintable()]


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000, "a\0b"], ids=["long", "deep", "NUL"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "@"), ("verify", "@", "@"), ("eval", "CKPT", "--data", "@"), ("predict", "CKPT", "@"),
        ("export", "CKPT", "--labels", "@"), ("export", "CKPT", "--config", "@"), ("fuse", "CKPT", "-o", "@.pth"),
        ("bench", "--suite", "@"), ("report", "@", "-o", "x.html"), ("package", "CKPT", "-o", "@"),
        ("refit", "@", "CKPT"),
        ("export", "CKPT", "--int8", "--calib", "@"), ("export", "CKPT", "--verify-data", "@", "-o", "@"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_path_that_no_file_can_have_is_one_error(
    arguments: tuple[str, ...], name: str, checkpoint_file: Path, tmp_path: Path
) -> None:
    given = [a.replace("CKPT", str(checkpoint_file)).replace("@", str(tmp_path / name)) for a in arguments]
    result = run(*given)
    assert result.exit_code == 1
    assert [line.partition(" ")[0] for line in result.stderr.splitlines()] == ["error:", "hint:"]


def test_a_configuration_cannot_drive_the_terminal_with_wrong_usage(checkpoint_file: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('opset = "\\u001b[31m\\nerror: forged"\n', encoding="utf-8")
    result = run("export", checkpoint_file, "--config", tmp_path / "own.toml")
    assert result.exit_code == 2
    assert not [line for line in result.stderr.splitlines() if line.startswith("error") or not line.isprintable()]


def test_failed_export_leaves_an_earlier_graph_as_it_was(graph: Path, checkpoint_file: Path) -> None:
    before = graph.read_bytes()
    state = torch.load(checkpoint_file, weights_only=True)
    state["linear.bias"][0] = float("nan")
    torch.save(state, checkpoint_file)
    failed(run("export", checkpoint_file, "-o", graph.parent, "--size", 32, *NO_ENGINE))
    assert graph.read_bytes() == before
    assert [path.name for path in graph.parent.iterdir()] == [graph.name]


def test_wrong_arch_names_the_right_one(checkpoint_file: Path) -> None:
    assert "contains custom RepVGG" in failed(run("inspect", checkpoint_file, "--arch", "B1g4"))


def test_output_that_cannot_be_written_is_an_error(checkpoint_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = failed(run("export", checkpoint_file, "-o", tmp_path / "file", "--size", 32, *NO_ENGINE))
    assert "is a file" in error


def test_an_engine_of_another_graph_beside_the_new_one_is_told_of(checkpoint_file: Path, tmp_path: Path) -> None:
    plan = tmp_path / f"{checkpoint_file.stem}.fp32.plan"
    plan.write_bytes(b"another build's")
    result = run("export", checkpoint_file, "-o", tmp_path, "--size", 32, *NO_ENGINE)
    assert f"note: {plan} was built from another graph" in result.stderr
    assert plan.read_bytes() == b"another build's"


USAGE = [
    ["export"],
    ["export", "a.pth", "--size", "0"],
    ["export", "a.pth", "--size", "224x"],
    ["export", "a.pth", "--mean", "a,b,c"],
    ["export", "a.pth", "--std", "nan,1,1"],
    ["export", "a.pth", "--batch", "0"],
    ["export", "a.pth", "--io", "int8"],
    ["export", "a.pth", "--no-verify"],
    ["fuse", "a.pth"],
    ["fuse", "a.pth", "-o", "b.pth", "--layout", "keras"],
    ["eval", "a.pth"],
    ["verify", "a.pth"],
    ["verify", "a.pth", "b.pth", "--count", "0"],
    ["verify", "a.pth", "b.pth", "--count", "3"],
    ["export", "a.pth", "--batch", "4", "--batch-range", "1", "2", "4"],
    ["export", "a.pth", "--engine", "none", "--refittable"],
    ["export", "a.pth", "--bn-eps", "nan"],
    ["bench", "A0", "--duration", "-1"],
    ["bench", "A0", "--warmup", "nan"],
    ["nonsense"],
    ["--nonsense"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr


def test_fuse_writes_a_deploy_form(checkpoint_file: Path, tmp_path: Path) -> None:
    value = object_of(run("fuse", checkpoint_file, "-o", tmp_path / "f.safetensors", "--layout", "timm", "--json"))
    checkpoint = load_checkpoint(value["file"])
    assert (checkpoint.layout, checkpoint.form, value["layout"]) == ("timm", "deploy", "timm")


def test_inspect_describes_a_checkpoint(checkpoint_file: Path) -> None:
    value = object_of(run("inspect", checkpoint_file, "--json"))
    assert {key: value[key] for key in ("kind", "layout", "form", "ema", "classes", "in_channels", "blocks")} == {
        "kind": "checkpoint",
        "layout": "official",
        "form": "train",
        "ema": False,
        "classes": 5,
        "in_channels": 3,
        "blocks": [1, 2, 2, 4, 1],
    }


def test_inspect_describes_a_graph_with_its_provenance(graph: Path, checkpoint_file: Path) -> None:
    value = object_of(run("inspect", graph, "--json"))
    assert value["kind"] == "onnx"
    assert value["inputs"] == [{"name": "images", "dtype": "float", "shape": ["batch", 3, 32, 32]}]
    assert value["outputs"] == [{"name": "logits", "dtype": "float", "shape": ["batch", 5]}]
    assert value["ops"] == {"Conv": 10, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1, "Relu": 10}
    assert value["provenance"]["sha256"] == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()


def test_inspect_of_a_damaged_graph_fails(graph: Path) -> None:
    graph.write_bytes(graph.read_bytes()[:300])
    assert "ONNX" in failed(run("inspect", graph))


def test_archs_lists_every_card() -> None:
    names = [row["arch"] for row in object_of(run("archs", "--json"))["archs"]]
    assert {"RepVGG-A0", "RepVGG-B3g4", "RepVGG-D2se"} <= set(names)
    text = run("archs").stdout
    assert all(name in text for name in names)


def test_ema_option_is_passed_on(state, save: Save) -> None:
    path = save({"model": state, "model_ema": name_in_layout(make_net(seed=2), "official")})
    assert object_of(run("inspect", path, "--ema", "--json"))["ema"] is True
    assert object_of(run("inspect", path, "--no-ema", "--json"))["ema"] is False
    assert object_of(run("inspect", path, "--json"))["notes"] == ["the file also has an EMA copy; --ema selects it"]


def test_verify_prints_the_differences(graph: Path, checkpoint_file: Path) -> None:
    value = object_of(run("verify", checkpoint_file, graph, "--json"))
    assert value["relative"] < 1e-5
    assert value.keys() == {"schema", "version", "a", "b", "max_abs", "relative", "cosine", "top1_agreement", "images"}


@pytest.mark.parametrize(
    "limits", [["--max-relative", "1e-3"], ["--max-abs", "1e-3"], ["--max-disagreement", "-1"], []]
)
def test_verify_fails_beyond_its_limits(limits: list[str], checkpoint_file: Path, save: Save) -> None:
    other = save(name_in_layout(make_net(seed=4), "official"), "other.pth")
    loose = [] if not limits or limits[0] == "--max-relative" else ["--max-relative", "1e9"]
    result = run("verify", checkpoint_file, other, "--size", 32, *loose, *limits)
    assert result.exit_code == (3 if limits else 1)
    assert result.stderr.startswith("error: ")


def test_eval_prints_the_promised_keys(checkpoint_file: Path, image_folder: Path) -> None:
    value = object_of(run("eval", checkpoint_file, "--data", image_folder, "--size", 32, "--json"))
    assert {"model", "backend", "images", "top1", "top5", "images_per_sec"} <= value.keys()
    assert value["images"] == 15


@pytest.mark.parametrize(("limit", "code"), [("0", 0), ("100.1", 3), ("nan", 3)])
def test_eval_fails_below_the_accuracy_asked_for(
    limit: str, code: int, checkpoint_file: Path, image_folder: Path
) -> None:
    result = run("eval", checkpoint_file, "--data", image_folder, "--size", 32, "--json", "--min-top1", limit)
    assert result.exit_code == code
    value = json.loads(result.stdout)
    assert value["images"] == 15
    assert ("error: top-1 is" in result.stderr) is bool(code)
    assert value.get("exit_status", 0) == code
    assert ("below --min-top1" in value.get("error", "")) is bool(code)


def test_eval_names_the_broken_images_on_stderr(checkpoint_file: Path, image_folder: Path) -> None:
    (image_folder / "class1" / "bad.png").write_bytes(b"no image")
    result = run("eval", checkpoint_file, "--data", image_folder, "--size", 32, "--json")
    assert "bad.png" in result.stderr
    assert list(object_of(result)["broken"]) == [str(image_folder / "class1" / "bad.png")]
    error = failed(run("eval", checkpoint_file, "--data", image_folder, "--size", 32, "--strict"))
    assert "bad.png is not an image" in error


def test_version_is_printed() -> None:
    assert run("--version").stdout.strip().endswith(repvgg_deploy.__version__)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    first_sentence = main.commands[command].help.split(".")[0]
    assert " ".join(first_sentence.split()) in " ".join(result.stdout.split())


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repvgg_deploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_module_runs_as_a_program(checkpoint_file: Path) -> None:
    done = process("inspect", checkpoint_file, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["layout"] == "official"


def test_program_exits_with_1_after_an_error_and_2_after_wrong_usage(tmp_path: Path) -> None:
    failed_, misused = process("inspect", tmp_path / "none.pth"), process("inspect")
    assert (failed_.returncode, failed_.stdout) == (1, "")
    assert failed_.stderr.startswith("error: there is no file")
    assert (misused.returncode, misused.stdout) == (2, "")


def test_help_takes_less_than_a_third_of_a_second_and_imports_nothing_heavy() -> None:
    seconds = []
    for _ in range(5):
        # Of the processor, not of the clock: what else the machine does is no matter.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = process("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    assert min(seconds) < 0.3
    code = "import sys, repvgg_deploy.cli.main; print(sorted({'torch', 'onnx', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "99"], "--opset 99 is not supported"),
        (["--opset", "9"], "--opset 9 is not supported"),
        (["--verify-data", "{}/none"], "--verify-data: there is no"),
        (["--int8", "--calib", "{}/none"], "--calib: there is no"),
        (["--int8", "--calib", "{}", "--max-drop", "1", "--val", "{}/none"], "--val: there is no"),
        (["--int8", "--calib", "{}", "--recipe", "none.toml"], "there is no recipe none.toml"),
        (["--labels", "{}/labels.txt", "--topk", "3"], "--topk 3 is more than the 2 classes of --labels"),
        (["--labels", "{}/none"], "cannot read --labels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_options_say_is_checked_before_the_checkpoint_is_read(
    options: list[str], message: str, image_folder: Path
) -> None:
    (image_folder / "labels.txt").write_text("a\nb\n")
    given = [option.format(image_folder) for option in options]
    assert message in failed(run("export", image_folder / "none.pth", *NO_ENGINE, *given))


def test_topk_and_labels_are_checked_against_the_checkpoint_before_anything_is_fused(
    checkpoint_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\n")
    for options in (["--topk", 6], ["--labels", tmp_path / "labels.txt"]):
        result = run("export", checkpoint_file, "--size", 32, *options, *NO_ENGINE)
        assert "fusing" not in result.stderr
        assert "5 classes" in failed(result)


@pytest.mark.parametrize("name", ["net.onnx", "out/net.plan"])
def test_the_name_of_a_file_is_no_folder_to_write_to(name: str, checkpoint_file: Path) -> None:
    result = run("export", checkpoint_file, "-o", name, *NO_ENGINE)
    assert result.exit_code == 2
    assert f"Write -o {Path(name).parent}." in " ".join(result.stderr.split())
    assert not Path(name).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "a.pth", "--arch", "B1g"], "Did you mean B1g4"),
        (["export", "a.pth", "--recipe", "acurate", "--int8"], "Did you mean accurate?"),
        (["export", "a.pth", "--engine", "tensorrt-rx"], "tensorrt-rtx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typing_error_gets_a_suggestion(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_arch_is_a_check_of_graphs_too(graph: Path) -> None:
    assert "not RepVGG-B3" in failed(run("inspect", graph, "--arch", "B3"))
    assert "not RepVGG-B3" in failed(run("eval", graph, "--arch", "B3", "--data", graph.parent))


def test_ema_is_for_checkpoints(graph: Path) -> None:
    assert "is an exported file" in failed(run("eval", graph, "--ema", "--data", graph.parent))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"a\n\nb\nc\nd\ne\n", "line 2"), ("ä".encode("latin-1"), "is not UTF-8 text")],
    ids=["empty", "blank line", "latin-1"],
)
def test_labels_that_cannot_be_meant_are_refused(
    content: bytes, message: str, checkpoint_file: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_bytes(content)
    result = run("export", checkpoint_file, "--labels", labels, "--size", 32, "-o", tmp_path / "out", *NO_ENGINE)
    assert message in failed_late(result)
    assert not (tmp_path / "out").exists()


def failed_late(result: Result) -> str:
    """The error line of a failure that comes after progress was told."""
    assert result.exit_code == 1
    assert result.stdout == ""
    return next(line for line in result.stderr.splitlines() if line.startswith("error: "))


def test_a_byte_order_mark_is_no_part_of_the_first_label(checkpoint_file: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\ufeffa\nb\nc\nd\ne\n", encoding="utf-8")
    options = ["--labels", labels, "--size", 32, "-o", tmp_path, *NO_ENGINE]
    assert run("export", checkpoint_file, *options).exit_code == 0
    names = object_of(run("inspect", tmp_path / "checkpoint.fp32.onnx", "--json"))["provenance"]["class_names"]
    assert names[0] == "a"


@pytest.mark.parametrize("options", [["--size", "00"], ["--size", "99999999"], ["--batch-range", "5", "2", "1"]])
def test_values_out_of_range_are_wrong_usage(options: list[str], checkpoint_file: Path) -> None:
    assert run("export", checkpoint_file, *options).exit_code == 2


@pytest.mark.parametrize("size", ["1", "7x7"])
def test_the_smallest_sizes_export(size: str, checkpoint_file: Path, tmp_path: Path) -> None:
    result = run("export", checkpoint_file, "--size", size, "-o", tmp_path / "out", *NO_ENGINE)
    assert result.exit_code == 0, result.output


def test_sigterm_takes_back_what_was_begun(checkpoint_file: Path, tmp_path: Path) -> None:
    """What ends a container: the export is stopped while its graph is being written."""
    script = (
        "import time; from repvgg_deploy.workflows import export as pipeline; from repvgg_deploy.__main__ import run; "
        "pipeline.write_graph = lambda *_: time.sleep(60); run()"
    )
    out = tmp_path / "out"
    options = ["export", str(checkpoint_file), "--size", "32", "-o", str(out), *NO_ENGINE]
    process = subprocess.Popen([sys.executable, "-c", script, *options], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out.exists() and any(out.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    assert not out.exists()


def test_the_demo_shows_the_other_rows_where_one_fails_and_names_the_files_that_it_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from repvgg_deploy.artifacts import Precision
    from repvgg_deploy.errors import VerificationError
    from repvgg_deploy.workflows import demo

    real = demo.export

    def fail_in_int8(request, *others):
        if request.precision is Precision.INT8:
            raise VerificationError("the outputs differ", "")
        return real(request, *others)

    monkeypatch.setattr(demo, "export", fail_in_int8)
    for name, value in {"_IMAGES": 24, "_CALIBRATION_IMAGES": 2, "_ROUNDS": 2, "_BATCH": 8}.items():
        monkeypatch.setattr(demo, name, value)
    result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: not in the table: fused int8: the outputs differ" in result.stderr
    lines = result.stdout.splitlines()
    files = ["demo.fp32.onnx", "demo.fp16.onnx", "predictions.png"]
    assert lines[-3:] == [str(tmp_path / name) for name in files]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.size == (828, 756)
    assert [line.split("  ")[0] for line in lines[1:-4]] == ["training", "fused", "training", "fused", "fused fp16"]
