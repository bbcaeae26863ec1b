"""Files appear all at once when everything has passed, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.files.kinds import file_kind, hash_file
from repvgg_deploy.files.staging import stage_files


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "dir" for p in folder.rglob("*")}


def stage(folder: Path, files: dict[str, str], error: BaseException | None = None) -> None:
    """Stage files of these contents, then fail with `error` where there is one."""
    with stage_files(folder) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)
        if error is not None:
            raise error


def test_files_appear_when_the_block_ends(tmp_path: Path) -> None:
    with stage_files(tmp_path) as staging:
        (staging / "a").write_text("1")
        (staging / "b").write_text("2")
        assert not (tmp_path / "a").exists()
    assert tree(tmp_path) == {"a": "1", "b": "2"}


def test_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    with stage_files(tmp_path / "x" / "y") as staging:
        (staging / "a").write_text("1")
    assert tree(tmp_path) == {"x": "dir", "x/y": "dir", "x/y/a": "1"}


def test_existing_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with stage_files(tmp_path) as staging:
        (staging / "a").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert tree(tmp_path) == {"a": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, VerificationError, MemoryError])
def test_failure_leaves_nothing_and_touches_nothing(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(error):
        stage(tmp_path, {"a": "new", "b": "new"}, error("stop"))
    assert tree(tmp_path) == {"a": "old"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_takes_back_the_folders_that_were_made_for_it(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        stage(tmp_path / "x" / "y" / "z", {"a": "new"}, error("stop"))
    assert tree(tmp_path) == {}


def test_failure_keeps_a_folder_that_was_there_although_empty(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="stop"):
        stage(tmp_path / "x" / "y", {"a": "new"}, ValueError("stop"))
    assert tree(tmp_path) == {"x": "dir"}


def test_failure_keeps_what_somebody_else_put_into_a_new_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"):
        stage(tmp_path / "x", {"../../foreign": "1"}, ValueError("stop"))
    assert tree(tmp_path) == {"x": "dir", "x/foreign": "1"}


def test_error_of_the_block_stays_what_it_is(tmp_path: Path) -> None:
    error = VerificationError("message", "hint")
    with pytest.raises(VerificationError) as caught:
        stage(tmp_path, {"a": "new"}, error)
    assert caught.value is error


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_file_where_the_folder_should_be_is_an_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(DeployError, match="cannot write to") as caught, stage_files(tmp_path / place):
        pass
    assert "-o" in caught.value.hint
    assert tree(tmp_path) == {"file": "1"}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody may write to")
def test_unwritable_folder_is_an_error() -> None:
    with pytest.raises(DeployError, match="cannot write to /proc/self"), stage_files(Path("/proc/self/new")):
        pass


def test_disk_that_is_full_from_the_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def make(path: Path, *others: Any, **options: Any) -> None:
        if path.name.startswith("."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *others, **options)

    monkeypatch.setattr(Path, "mkdir", make)
    with pytest.raises(DeployError, match="No space left on device"), stage_files(tmp_path / "x" / "y"):
        pass
    assert tree(tmp_path) == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_disk_that_runs_full_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(DeployError, match="No space left on device"):
        stage(tmp_path, {"a": "new", "/dev/full": "more"})
    assert tree(tmp_path) == {"a": "old"}


def test_directory_in_the_way_of_one_file_stops_all(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(DeployError, match="b is a directory"):
        stage(tmp_path, {"a": "1", "b": "2"})
    assert tree(tmp_path) == {"b": "dir"}


def test_files_get_the_permissions_that_any_new_file_has(tmp_path: Path) -> None:
    with stage_files(tmp_path) as staging:
        (staging / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_two_at_a_time_do_not_meet(tmp_path: Path) -> None:
    with stage_files(tmp_path) as first, stage_files(tmp_path) as second:
        (first / "a").write_text("1")
        (second / "b").write_text("2")
    assert tree(tmp_path) == {"a": "1", "b": "2"}


def test_the_hash_is_that_of_the_bytes_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"one", b"another"):
        path.write_bytes(content)
        assert hash_file(path) == hashlib.sha256(content).hexdigest()


def test_a_pipe_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.onnx")
    before = (tmp_path / "net.onnx").lstat()
    with pytest.raises(DeployError, match="is a pipe or a device") as raised:
        stage(tmp_path, {"net.onnx": "new", "other": "new"})
    assert raised.value.hint
    assert (tmp_path / "net.onnx").lstat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_the_kind_of_a_pipe_is_told_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net")
    assert file_kind(tmp_path / "net") == "checkpoint"
