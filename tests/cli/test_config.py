"""Options in a file and in the environment, and what a shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from repvgg_deploy.cli.main import main


def parse(name: str, *arguments: object) -> dict[str, Any]:
    """The values that a command would run with."""
    context = main.commands[name].make_context(name, [str(argument) for argument in arguments])
    before_run = context.meta.get("repvgg_deploy.before_run")
    if before_run is not None:
        before_run()
    return dict(context.params)


OPTIONS = {
    "export": [
        "net.pth", "--fp16", "--size", "192x256", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--topk", "5",
        "--batch-range", "1", "8", "64", "--keep-float", "stages.0.0", "--keep-float", "classifier", "--no-tf32",
        "--labels", 'a "quoted" näme.txt', "-o", "out", "--engine", "tensorrt-rtx", "--max-drop", "0.5", "--no-ema",
    ],
    "bench": [
        "A0", "--batch", "1,8", "--batch", "32", "--backend", "torch-cpu,onnxruntime-cpu", "--precision", "fp32",
        "--baseline", "resnet50", "--duration", "0.5", "--roofline", "--input", "jpeg", "images",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_options_are_read_back_as_they_were(name: str, tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    given = parse(name, *OPTIONS[name], "--save-config", path)
    assert parse(name, OPTIONS[name][0], "--config", path) == given
    saved = tomllib.loads(path.read_text(encoding="utf-8"))
    assert saved.keys() == {name}
    assert "warmup" not in saved[name], "what was not given stays out"


def test_what_is_typed_counts_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text('[export]\nopset = 17\nsize = 192\nengine = "none"\n', encoding="utf-8")
    values = parse("export", "net.pth", "--config", path, "--opset", 18)
    assert (values["opset"], values["size"], values["engine"]) == (18, (192, 192), "none")


def test_a_file_may_be_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text('batch = [1, 8]\nbackend = "torch-cpu"\nmin_ratio = 1.5\n', encoding="utf-8")
    values = parse("bench", "A0", "--config", path)
    assert values["batch"] == ((1,), (8,))
    assert values["backend"] == (("torch-cpu",),)
    assert values["min_ratio"] == 1.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('opsett = 17\n', "unknown option 'opsett'. Did you mean opset"),
        ("opset = \n", "cannot read"),
        ("export = 1\n", "export is a value, not a table"),
        ("export = [[1]]\n", "export is a value, not a table"),
        ("x = " + "[" * 5000, "cannot read"),
        ("\0", "cannot read"),
        ('opset = "many"\n', "'many' is not a valid integer"),
        ("[other]\nopset = 17\n", "unknown option 'other'"),
        ('module = "os:system"\n', "module names code, so it is taken from the command line only"),
        ("kwargs = '{}'\n", "kwargs names code"),
    ],
    ids=["key", "syntax", "a number", "a list", "deep", "control character", "value", "table", "code", "its keywords"],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_wrong_usage(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(click.UsageError) as raised:
        parse("export", "net.pth", "--config", path)
    assert message in raised.value.format_message()


def test_the_environment_sets_options() -> None:
    environment = {"REPVGG_DEPLOY_EXPORT_OPSET": "99", "REPVGG_DEPLOY_EXPORT_ENGINE": "none"}
    result = CliRunner().invoke(main, ["export", "none.pth"], env=environment)
    assert (result.exit_code, "--opset 99 is not supported" in result.stderr) == (1, True)
    result = CliRunner().invoke(main, ["export", "none.pth"], env={"REPVGG_DEPLOY_EXPORT_OPSET": "x"})
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("typed", "begun", "completed"),
    [
        (["bench", "--backend"], "onnxruntime-c", {"onnxruntime-cpu", "onnxruntime-cuda"}),
        (["bench", "--backend"], "torch-cpu,tensorrt-", {"torch-cpu,tensorrt-rtx"}),
        (["bench", "--baseline"], "resnet1", {"resnet18", "resnet101"}),
        (["export", "--arch"], "b1", {"B1", "B1g2", "B1g4"}),
        (["export", "--recipe"], "", {"accurate", "fast", "thorough"}),
        (["export"], "--calib-c", {"--calib-count", "--calib-cache"}),
        ([], "ex", {"export"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_shell_completes_names(typed: list[str], begun: str, completed: set[str]) -> None:
    found = ShellComplete(main, {}, "repvgg-deploy", "_REPVGG_DEPLOY_COMPLETE").get_completions(typed, begun)
    assert {item.value for item in found} == completed


@pytest.mark.parametrize("name", sorted(main.commands))
def test_the_examples_of_a_command_are_commands(name: str) -> None:
    import shlex

    examples = getattr(main.commands[name], "examples", ())
    assert examples
    for line in examples:
        # On several processes the program is a module of torchrun.
        words = shlex.split(re.sub(r"^torchrun .* -m repvgg_deploy ", "repvgg-deploy ", line.split("|")[-1]))
        assert words[0] == "repvgg-deploy"
        command = main.commands[words[1]]
        known = {option for p in command.params if isinstance(p, click.Option) for option in p.opts + p.secondary_opts}
        assert all(word in known for word in words if word.startswith("-") and len(word) > 1), line


@pytest.mark.parametrize(
    "line",
    [
        "opset = [17]", "opset = 1e300", "fp16 = 1", 'fp16 = "yes"', "fp16 = [true]", "batch = true", "batch = [[1]]",
        "labels = [1]", 'labels = ["a"]', "recipe = [1]", "recipe = 3", "keep-float = [[1]]",
        "batch-range = 5", "batch-range = [1, true, 3]", "size = [[1, 2]]", "mean = [[0.5]]", "engine = 7",
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_wrong_usage_that_names_the_option(line: str, tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text(f"{line}\n", encoding="utf-8")
    found = CliRunner().invoke(main, ["export", "net.pth", "--config", str(path)])
    assert (found.exit_code, found.stdout) == (2, ""), found.exception
    assert line.partition(" ")[0] in found.stderr


def test_options_are_not_saved_to_a_pipe_which_nobody_may_ever_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "options.toml")
    command = [sys.executable, "-m", "repvgg_deploy", "export", "net.pth", "--save-config", "options.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "is a pipe or a device" in done.stderr) == (2, True), done.stderr
