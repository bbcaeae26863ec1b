"""A set of files is the old one or the new one, whatever fails and whenever the process ends: at each system call."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from helpers.faults import FAILED, count_calls, install, run_child, send
from helpers.publishing_faults import OLD, has_work, publish, read, write

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files import work_folders
from repvgg_deploy.files.publishing import finish_interrupted
from repvgg_deploy.files.staging import scratch_folder, stage_files

_TESTS = Path(__file__).resolve().parents[1]


def try_each_call(kind: str, before: str, tmp_path: Path, *options: str) -> list[dict[str, object]]:
    """A fault of `kind` at each system call; see the module."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.publishing_faults", kind, before, str(tmp_path), *options],
        cwd=_TESTS, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"mixed"} & {row["found_next"] for row in rows} == set(), rows
    assert not any(row["work_next"] for row in rows), rows
    return rows


def states(rows: list[dict[str, object]], key: str = "found") -> set[object]:
    return {row[key] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "old"])
def test_a_call_that_fails_leaves_the_old_files_or_the_new_ones(before: str, tmp_path: Path) -> None:
    rows = try_each_call("error", before, tmp_path)
    assert {"os.rename", "os.fsync", "os.link", "fcntl.flock", "open", "os.mkdir"} - {*states(rows, "call")} <= (
        {"os.link"} if before == "nothing" else set()
    )
    # An error while the work folder is removed is none of the command's.
    assert {(row["status"], row["found"]) for row in rows} == {(0, "new"), (FAILED, "old")}


@pytest.mark.slow
def test_a_disk_that_breaks_for_good_is_mended_by_the_next_run(tmp_path: Path) -> None:
    rows = try_each_call("broken-disk", "old", tmp_path)
    found = {(row["status"], row["found"]) for row in rows}
    # That the names of a complete set are on the disk could not be made sure of.
    assert found == {(0, "new"), (FAILED, "old"), (FAILED, "mixed"), (FAILED, "new")}


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "old"])
def test_a_killed_process_leaves_a_set_that_the_next_one_completes(before: str, tmp_path: Path) -> None:
    rows = try_each_call("sigkill", before, tmp_path)
    assert [row["status"] for row in rows] == [-signal.SIGKILL] * (len(rows) - 1) + [0]
    assert states(rows) == {"old", "new", "mixed"}
    assert all(row["found_next"] == ("old" if row["found"] == "old" else "new") for row in rows)


@pytest.mark.slow
def test_a_process_killed_while_it_completes_a_set_leaves_it_to_the_next_one(tmp_path: Path) -> None:
    rows = try_each_call("sigkill-next", "old", tmp_path)
    assert states(rows) == {"new", "mixed"}
    assert states(rows, "found_next") == {"new"}
    assert states(rows, "status") == {0, -signal.SIGKILL}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_call_of_a_command_leaves_the_old_files_or_the_new_ones(
    number: signal.Signals, tmp_path: Path
) -> None:
    rows = try_each_call(f"{number.name.lower()}-command", "old", tmp_path)
    assert {(row["status"], row["found"]) for row in rows} == {(0, "new"), (128 + number, "old")}
    assert states(rows, "work") == {False}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_the_renames_of_a_python_program_takes_effect_after_them(
    number: signal.Signals, tmp_path: Path
) -> None:
    rows = try_each_call(f"{number.name.lower()}-python", "old", tmp_path)
    # Python's own way is KeyboardInterrupt; the others end the process at once.
    ended = FAILED if number == signal.SIGINT else -number
    assert {(row["status"], row["found"]) for row in rows} == {(0, "new"), (ended, "new"), (ended, "old")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["error", "sigkill"])
def test_without_hard_links_the_old_files_come_back_as_well(kind: str, tmp_path: Path) -> None:
    rows = try_each_call(kind, "old", tmp_path, "no-links")
    assert states(rows) == ({"old", "new"} if kind == "error" else {"old", "new", "mixed"})


def kill_between(folder: Path) -> None:
    """Leave a set of which the graph has taken its place, but not the plan."""
    for each in (folder, folder.parent / "dry"):
        write(each, OLD)
    calls = count_calls(lambda: publish(folder.parent / "dry"))
    renames = [number for number, name in enumerate(calls) if name == "os.rename"]

    def be_killed() -> None:
        install(renames[-2], send(signal.SIGKILL))
        publish(folder)

    assert run_child(be_killed) == -signal.SIGKILL
    assert (read(folder)["net.onnx"], read(folder)["net.plan"]) == ("graph", "old plan")


def test_a_reader_completes_the_set_first(tmp_path: Path) -> None:
    from repvgg_deploy.engine.loading import check_plan
    from repvgg_deploy.runtime.model import open_model

    for name, reader in (("net.plan", check_plan), ("net.onnx", open_model)):
        folder = tmp_path / name / "out"
        kill_between(folder)
        # The texts of this test are neither.
        with pytest.raises(DeployError):
            reader(folder / name)
        assert {text for text in read(folder).values() if "old" in text} == set()
        assert not has_work(folder)


def test_files_that_somebody_has_changed_since_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    kill_between(folder)
    (folder / "net.onnx").write_text("by hand")
    finish_interrupted(folder)
    assert not has_work(folder)
    assert read(folder)["net.onnx"] == "by hand"
    assert read(folder)["net.plan"] == "old plan"


NO_JOURNALS = (
    "", "{", "[1]", '[{"path": "x"}]', '[{"path": "../x", "new": [1], "old": null}]', "[" * 100_000, "9" * 5000,
    '[{"path": "/x", "new": [1], "old": [1]}]', '[{"path": "", "new": [1], "old": [1]}]',
    '[{"path": "x", "new": ["1"], "old": null}]', '[{"path": 1, "new": [1], "old": null}]',
    '[{"path": "a\\u0000b", "new": [1], "old": null}]', '[{"path": "x/../../y", "new": [1], "old": [1]}]',
)  # fmt: skip


def everything(folder: Path) -> dict[str, bytes]:
    """All files, those of work folders among them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x} {text}"


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["journal", "rollback"])
@pytest.mark.parametrize("journal", NO_JOURNALS, ids=lambda text: text[:40])
def test_a_journal_that_is_none_moves_nothing_and_loses_nothing(
    journal: str, name: str, whole: bool, tmp_path: Path
) -> None:
    work = tmp_path / "out" / ".repvgg-deploy-0"
    write(work, {"new/x": "1", name: with_checksum(journal) if whole else journal, "old/x": "2"})
    before = everything(tmp_path)
    with pytest.raises(DeployError, match=r"may have files of two runs: the journal .* is damaged") as raised:
        finish_interrupted(tmp_path / "out")
    assert f"{work}/new" in raised.value.hint
    assert everything(tmp_path) == before


def test_a_bit_in_a_journal_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    kill_between(folder)
    (journal,) = folder.glob(".repvgg-deploy-*/journal")
    text, before = journal.read_text(), everything(folder)
    digit = text.rindex("5") if "5" in text[10:] else text.rindex("1")
    journal.write_text(f"{text[:digit]}7{text[digit + 1 :]}")
    with pytest.raises(DeployError, match="is damaged"):
        finish_interrupted(folder)
    journal.write_text(text)
    assert everything(folder) == before
    finish_interrupted(folder)
    assert not has_work(folder)


@pytest.mark.parametrize("place", ["new", "old"])
def test_what_a_damaged_journal_leaves_nothing_open_of_is_removed(place: str, tmp_path: Path) -> None:
    name = {"new": "rollback", "old": "journal"}[place]
    write(tmp_path / ".repvgg-deploy-0", {name: "damaged", **({"old/x": "2"} if place == "old" else {})})
    finish_interrupted(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_moves_nothing_out_of_the_folder(tmp_path: Path) -> None:
    work = tmp_path / "out" / ".repvgg-deploy-0"
    write(work, {"new/a": "1"})
    write(tmp_path, {"x": "foreign"})
    found = (tmp_path / "x").stat()
    moved = {"path": "../x", "new": [found.st_ino, found.st_size, found.st_mtime_ns], "old": None}
    moves = [moved, {"path": "a", "new": [0, 0, 0], "old": None}]
    (work / "journal").write_text(with_checksum(json.dumps(moves)))
    before = everything(tmp_path)
    with pytest.raises(DeployError, match="is damaged"):
        finish_interrupted(tmp_path / "out")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["journal", "rollback"])
def test_a_journal_that_was_made_up_moves_nothing_through_a_link(name: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    work = folder / ".repvgg-deploy-0"
    write(work, {"new/link/x": "evil", "old/link/x": "evil"})
    (folder / "link").symlink_to(outside)
    # The old file aside, the new one not there yet: no inode has to be known for that.
    moves = [{"path": "link/x", "new": [1, 1, 1], "old": [2, 2, 2]}]
    (work / name).write_text(with_checksum(json.dumps(moves)))
    with pytest.raises(DeployError, match="is damaged"):
        finish_interrupted(folder)
    assert list(outside.iterdir()) == []


def test_a_pipe_in_the_place_of_a_journal_is_not_waited_for(tmp_path: Path) -> None:
    work = tmp_path / "out" / ".repvgg-deploy-0"
    write(work, {"new/x": "1"})
    os.mkfifo(work / "journal")
    with pytest.raises(DeployError, match="is damaged"):
        finish_interrupted(tmp_path / "out")


def test_what_a_killed_process_left_is_removed_by_the_next_one_but_a_living_one_is_not_disturbed(
    tmp_path: Path,
) -> None:
    with stage_files(tmp_path) as living:
        (living / "a").write_text("1")
        (tmp_path / ".repvgg-deploy-dead" / "new").mkdir(parents=True)
        write(tmp_path / ".repvgg-deploy-dead", {"new/net.onnx": "half"})
        with stage_files(tmp_path) as staging:
            (staging / "b").write_text("2")
        assert [path.name for path in tmp_path.glob(".repvgg-deploy-*")] == [living.parent.name]
    assert read(tmp_path) == {"a": "1", "b": "2"}


def test_where_folders_cannot_be_locked_leftovers_are_removed_a_day_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(work_folders.fcntl, "flock", refuse)
    for name in (".repvgg-deploy-old", ".repvgg-deploy-new"):
        write(tmp_path / name, {"new/net.onnx": "half"})
    for path in (tmp_path / ".repvgg-deploy-old").rglob("*"):
        os.utime(path, (0, 0))
    os.utime(tmp_path / ".repvgg-deploy-old", (0, 0))
    write(tmp_path, OLD)
    publish(tmp_path)
    assert [path.name for path in tmp_path.glob(".repvgg-deploy-*")] == [".repvgg-deploy-new"]
    assert (tmp_path / "net.plan").read_text() == "plan"


def test_a_temporary_folder_of_a_killed_process_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def be_killed() -> None:
        with scratch_folder() as folder:
            (folder / "a").write_text("1")
            os.kill(os.getpid(), signal.SIGKILL)

    with scratch_folder() as living:
        run_child(be_killed)
        assert len(list(tmp_path.iterdir())) == 2
        with scratch_folder():
            pass
        assert list(tmp_path.iterdir()) == [living.parent]
    assert list(tmp_path.iterdir()) == []


def test_files_are_published_into_a_temporary_folder_of_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own lock must not be what the renames wait for."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def nest() -> None:
        # Ends a process that waits for ever.
        signal.alarm(20)
        with scratch_folder() as folder:
            for target in (folder, folder / "deeper"):
                with stage_files(target) as staging, stage_files(staging) as inner:
                    (inner / "a").write_text("1")
                assert (target / "a").read_text() == "1"

    assert run_child(nest) == 0


@pytest.mark.slow
def test_sets_of_two_runs_are_published_one_after_the_other(tmp_path: Path) -> None:
    """Eight threads publish ten sets each; a reader that locks the folder finds no mixture."""
    names = ("net.onnx", "net.plan", "net.plan.json")
    write(tmp_path, dict.fromkeys(names, "start"))
    stop, mixed = threading.Event(), list[set[str]]()

    def publish_all(run: str) -> None:
        for number in range(10):
            with stage_files(tmp_path) as staging:
                write(staging, dict.fromkeys(names, f"{run} {number}"))

    def watch() -> None:
        while not stop.is_set():
            with work_folders.locked(tmp_path):
                found = {(tmp_path / name).read_text() for name in names}
            if len(found) > 1:
                mixed.append(found)

    reader = threading.Thread(target=watch)
    threads = [threading.Thread(target=publish_all, args=(str(number),)) for number in range(8)]
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    reader.join()
    assert mixed == []
    assert len({(tmp_path / name).read_text() for name in names}) == 1
    assert not has_work(tmp_path)


def test_a_folder_that_another_run_removes_after_its_error_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = Path.mkdir, tmp_path / "out"

    def make(path: Path, *arguments: object, **options: object) -> None:
        if path.name.startswith(".repvgg-deploy-") and not list(tmp_path.glob("seen")):
            write(tmp_path, {"seen": ""})
            folder.rmdir()
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", make)
    with stage_files(folder) as staging:
        (staging / "a").write_text("1")
    assert read(folder) == {"a": "1"}


def test_a_file_in_the_way_of_a_folder_stops_all(tmp_path: Path) -> None:
    write(tmp_path, {"entry": "a file"})
    with pytest.raises(DeployError, match="entry is a file, so no directory can take its place"):
        publish(tmp_path)
    assert read(tmp_path) == {"entry": "a file"}
