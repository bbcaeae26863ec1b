"""`export --lock`, `--from` and `--provenance`: what made an artifact, made again, and what is said if it differs."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from repvgg_deploy.cli.main import main
from repvgg_deploy.errors import DeployError
from repvgg_deploy.workflows.lock import Inputs, Lock, LockedFile, LockedImages, read_lock, require_artifact, write_lock

PLAIN = ["--size", "32", "--engine", "none"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def locked(checkpoint_file: Path, image_folder: Path, tmp_path: Path) -> Path:
    """The lock file of an INT8 export into `first/`, beside its statement."""
    lock = tmp_path / "locks" / "deploy.toml"
    options = ["--int8", "--calib", image_folder, "--recipe", "fast", "--keep-float", "classifier"]
    done = run("export", checkpoint_file, *PLAIN, *options, "-o", tmp_path / "first", "--lock", lock, "--provenance")
    assert done.exit_code == 0, done.output
    return lock


@pytest.mark.slow
def test_an_int8_export_is_made_again_byte_for_byte_and_refused_where_an_input_differs(
    locked: Path, checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    again, graph = tmp_path / "again", "checkpoint.int8.onnx"
    result = run("export", "--from", locked, "-o", again, "--json")
    assert result.exit_code == 0, result.output
    assert (again / graph).read_bytes() == (tmp_path / "first" / graph).read_bytes()
    assert [path.name for path in again.iterdir()] == [graph]
    assert f"the graphs are those of {locked}, byte for byte" in result.stderr
    assert json.loads(result.stdout)["quantization"]["kept_float"] == ["classifier"]

    image = image_folder / "class1" / "0.png"
    content = image.read_bytes()
    (image_folder / "class2" / "more.png").write_bytes(content)
    image.write_bytes(content + b"\0")
    assert_refused(locked, tmp_path, "class2/more.png is new, and 1 more")
    (image_folder / "class2" / "more.png").unlink()
    assert_refused(locked, tmp_path, f"the calibration images are not those of {locked}: class1/0.png differs")
    image.unlink()
    assert_refused(locked, tmp_path, "class1/0.png is missing")
    image.write_bytes(content)

    assert_refused(locked, tmp_path, "the recipe accurate is not the one of", "--recipe", "accurate")
    state = torch.load(checkpoint_file, weights_only=True)
    state["linear.bias"] += 1
    torch.save(state, checkpoint_file)
    assert_refused(locked, tmp_path, f"the checkpoint {checkpoint_file} is not the one of {locked}: its sha256 is")


def assert_refused(lock: Path, tmp_path: Path, message: str, *options: object) -> None:
    result = run("export", "--from", lock, "-o", tmp_path / "refused", *options)
    assert result.exit_code == 1, result.output
    assert f"error: {message}" in result.stderr or message in result.stderr
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_the_lock_and_the_statement_name_what_was_read_and_written(
    locked: Path, checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    values = tomllib.loads(locked.read_text(encoding="utf-8"))
    graph = tmp_path / "first" / "checkpoint.int8.onnx"
    assert values["export"]["ckpt"] == str(checkpoint_file)
    assert not {"output", "lock", "provenance"} & values["export"].keys()
    assert values["artifacts"] == {graph.name: digest(graph)}
    assert values["checkpoint"]["sha256"] == digest(checkpoint_file)
    names = sorted(str(path.relative_to(image_folder)) for path in image_folder.rglob("*.*"))
    assert values["calibration"]["files"] == [f"{digest(image_folder / name)}  {name}" for name in names]
    assert values["settings"]["size"] == "32,32"
    assert {"repvgg-deploy", "python", "torch", "onnx"} <= values["tools"].keys()

    statement = json.loads((tmp_path / "first" / "checkpoint.int8.provenance.json").read_text(encoding="utf-8"))
    assert (statement["_type"], statement["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    assert statement["subject"] == [{"name": graph.name, "digest": {"sha256": digest(graph)}}]
    definition = statement["predicate"]["buildDefinition"]
    materials = {entry["name"]: entry["digest"]["sha256"] for entry in definition["resolvedDependencies"]}
    assert materials == {
        "checkpoint": digest(checkpoint_file),
        "recipe": values["recipe"]["sha256"],
        "calibration list": values["calibration"]["sha256"],
    }
    assert definition["externalParameters"]["options"] == values["export"]
    assert statement["predicate"]["runDetails"]["builder"]["version"] == values["tools"]


@pytest.mark.slow
def test_the_lock_lies_beside_the_graph_and_what_is_typed_wins(checkpoint_file: Path, tmp_path: Path) -> None:
    lock = tmp_path / "deploy.toml"
    assert run("export", checkpoint_file, *PLAIN, "--fp16", "-o", tmp_path, "--lock", lock).exit_code == 0
    other = tmp_path / "moved" / "checkpoint.pth"
    other.parent.mkdir()
    checkpoint_file.rename(other)
    assert run("export", other, "--from", lock, "-o", tmp_path / "again").exit_code == 0
    assert digest(tmp_path / "again" / "checkpoint.fp16.onnx") == digest(tmp_path / "checkpoint.fp16.onnx")
    # Another activation is another artifact, and the message says what differs.
    result = run("export", other, "--from", lock, "--act", "silu", "-o", tmp_path / "silu")
    assert (result.exit_code, "activation is silu, but relu in" in result.stderr) == (1, True)
    assert not (tmp_path / "silu").exists()


LOCK = Lock(
    {"ckpt": "net.pth", "fp16": True, "keep-float": ["a", "b"], "size": "64"},
    Inputs(
        LockedFile("net.pth", "0" * 64),
        LockedImages('a "b"', "1" * 64, ("2  c",)),
        labels=LockedFile("é\x7f", "3" * 64),
    ),
    {"strides": "2,2"},
    {"net.fp16.onnx": "4"},
    {"torch": "1.0", "onnx": "2.0"},
)


def test_a_lock_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_lock(LOCK, tmp_path / "deploy.toml")
    assert read_lock(tmp_path / "deploy.toml") == LOCK


def drop_version(text: str) -> str:
    return text.replace("version = 1", "")


def raise_version(text: str) -> str:
    return text.replace("version = 1", "version = 2")


def drop_checkpoint(text: str) -> str:
    return text.replace("[checkpoint]", "[other]")


def break_type(text: str) -> str:
    return text.replace(f'sha256 = "{"3" * 64}"', "sha256 = 3")


def cut(text: str) -> str:
    return text[:-5]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_version, "missing field `version`"),
        (raise_version, "has the version 2, but this release reads 1"),
        (drop_checkpoint, "missing field `checkpoint`"),
        (break_type, "labels.sha256: Expected `str`, got `int`"),
        (cut, "cannot read"),
    ],
)
def test_a_file_that_is_no_lock_is_refused(damage: Callable[[str], str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "deploy.toml"
    write_lock(LOCK, path)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(DeployError) as raised:
        read_lock(path)
    assert message in raised.value.message
    assert run("export", "--from", path).exit_code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ckpt": 3}, "ckpt is not the name of a file"),
        ({"ckpt": ["net.pth"]}, "ckpt is not the name of a file"),
        ({"output": "/elsewhere"}, "output is no option of a lock file"),
        ({"lock": "x.toml"}, "lock is no option of a lock file"),
        ({"junit": "x.xml"}, "junit is no option of a lock file"),
        ({"module": "os:system"}, "module names code"),
        ({"nothing": 1}, "unknown option 'nothing'"),
    ],
)
def test_a_lock_says_neither_where_files_go_nor_which_code_runs(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_lock(replace(LOCK, options=options), tmp_path / "deploy.toml")
    result = run("export", "--from", tmp_path / "deploy.toml", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_lock_says_not_where_a_calibration_cache_is_written(
    checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    cache, lock = tmp_path / "cache.npz", tmp_path / "deploy.toml"
    options = ["--int8", "--calib", image_folder, "--recipe", "fast", "--calib-cache", cache]
    assert run("export", checkpoint_file, *PLAIN, *options, "-o", tmp_path / "first", "--lock", lock).exit_code == 0
    cache.unlink()
    result = run("export", "--from", lock, "-o", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert not cache.exists()
    # Where whoever runs the command says so, it is.
    result = run("export", "--from", lock, "--calib-cache", tmp_path / "own.npz", "-o", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "own.npz").exists()


def test_an_artifact_that_differs_names_the_versions_that_do(tmp_path: Path) -> None:
    graph = tmp_path / "net.fp16.onnx"
    graph.write_bytes(b"graph")
    tools: dict[str, Any] = {"torch": "1.1", "onnx": "2.0"}
    with pytest.raises(DeployError, match=r"net\.fp16\.onnx differs") as raised:
        require_artifact(graph, LOCK, Path("deploy.toml"), tools)
    assert raised.value.hint == "install the versions that made it: torch 1.0, now 1.1"
    with pytest.raises(DeployError, match=r"records no other\.onnx, but net\.fp16\.onnx"):
        require_artifact(tmp_path / "other.onnx", LOCK, Path("deploy.toml"), tools)
