"""The command line's contract: exit codes, what goes to stdout and stderr, and nothing written on failure."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.commands import NO_ENGINE, failed, process, run

import repvgg_deploy
from repvgg_deploy.cli.main import main

Save = Callable[..., Path]


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


NO_MEMORY = (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"))


@pytest.mark.parametrize("error", NO_MEMORY, ids=["Python", "torch"])
def test_too_little_memory_is_an_error_wherever_it_shows(
    error: Exception, checkpoint_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("repvgg_deploy.workflows.fuse_checkpoint.write_fused", fail)
    result = run("fuse", checkpoint_file, "-o", tmp_path / "fused.pth")
    assert failed(result) == "error: there is too little memory for this"
    assert failed(run("fuse", checkpoint_file, "-o", tmp_path / "fused.pth", "--json")).startswith("error: there is")
    monkeypatch.setattr("repvgg_deploy.workflows.fuse_checkpoint.write_fused", lambda *_, **__: 1 / 0)
    assert isinstance(run("fuse", checkpoint_file, "-o", tmp_path / "fused.pth").exception, ZeroDivisionError)


def test_version_is_printed() -> None:
    assert run("--version").stdout.strip().endswith(repvgg_deploy.__version__)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    first_sentence = main.commands[command].help.split(".")[0]
    assert " ".join(first_sentence.split()) in " ".join(result.stdout.split())


@pytest.mark.slow
def test_module_runs_as_a_program(checkpoint_file: Path) -> None:
    done = process("inspect", checkpoint_file, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["layout"] == "official"


@pytest.mark.slow
def test_program_exits_with_1_after_an_error_and_2_after_wrong_usage(tmp_path: Path) -> None:
    failed_, misused = process("inspect", tmp_path / "none.pth"), process("inspect")
    assert (failed_.returncode, failed_.stdout) == (1, "")
    assert failed_.stderr.startswith("error: there is no file")
    assert (misused.returncode, misused.stdout) == (2, "")


@pytest.mark.slow
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
