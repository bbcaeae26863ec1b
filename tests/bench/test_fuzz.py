"""The fuzzer: its cases come from their seed, its watch sees what it is for, and a share of its cases passes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from fuzzing import checkpoints, own
from fuzzing.campaign import FORMATS, read_log, summarize
from fuzzing.cases import UnreadableError
from fuzzing.child import CPU_SECONDS, MEMORY, Result
from fuzzing.mutations import FORGED
from fuzzing.oracle import compare_logits, compute_logits, read_tensors
from fuzzing.pickles import split_pickle
from fuzzing.verdict import judge
from fuzzing.zips import Zip, make_entry, read_zip, write_zip

from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.files.publishing import finish_interrupted
from repvgg_deploy.fusion.fuse import fuse

ROOT = Path(__file__).resolve().parents[2]
CLEAR = Result(1, "", "error: the file is damaged\nhint: copy it again\n", "", (), "", False, 0.1, 0.1, 1 << 20)
SHARE, SEED = 120, 7


# A saved run is trained first, and a lock file exported.
OWN = [pytest.param(form, marks=() if form.name == "publish journal" else pytest.mark.exhaustive, id=form.name)
       for form in FORMATS["own"]]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", [*(pytest.param(form, id=form.name) for form in FORMATS["foreign"]), *OWN])
def test_cases_come_from_their_seed_and_differ(form) -> None:
    made = [form.make(Random(f"a/{number}")) for number in range(12)]
    again = [form.make(Random(f"a/{number}")) for number in range(12)]
    same = [[(c.arguments, c.files, c.before, c.mutation) for c in cases] for cases in (made, again)]
    assert same[0] == same[1]
    assert len({(case.arguments, *case.files.values(), *case.before.values()) for case in made}) > 6


def test_clear_errors_and_successes_are_allowed() -> None:
    assert judge(CLEAR).outcome == "error"
    assert judge(replace(CLEAR, status=0, stderr="note: fine\n")).outcome == "success"
    assert judge(replace(CLEAR, status=2, stderr="Usage: …\nError: no such option\n")).outcome == "usage"
    assert judge(replace(CLEAR, status=3)).outcome == "limit"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"crash": "Traceback …\nKeyError: 'x'"}, "traceback: KeyError"),
        ({"stderr": "Traceback (most recent call last):\nerror: x\n"}, "a traceback on standard error"),
        ({"stderr": ""}, "0 errors and 0 hints"),
        ({"stderr": f"error: x\nerror: {FORGED}\n"}, "an error is forged"),
        ({"stdout": f"name\nerror: {FORGED}\n", "status": 0}, "an error is forged"),
        ({"stderr": "error: \x1b[31mred\n"}, "a control character"),
        ({"stdout": "a\u202eb"}, "a control character"),
        ({"status": -11}, "ended by signal 11"),
        ({"status": 70}, "exit status 70"),
        ({"status": None}, "it ran too long"),
        ({"cpu_s": CPU_SECONDS + 1.0}, "s of CPU time"),
        ({"peak_bytes": MEMORY + 1}, "MiB of memory"),
        ({"violations": ("os.system ('id',)",)}, "canary: os.system"),
        ({"wrong": "logits differ", "status": 0}, "wrong output"),
    ],
)
def test_all_else_is_a_failure(change: dict, reason: str) -> None:
    verdict = judge(replace(CLEAR, **change))
    assert verdict.outcome == "failed"
    assert reason in verdict.reason


CANARY = """
import os, pickle, socket, sys
sys.path.insert(0, {bench!r})
from pathlib import Path
from fuzzing.campaign import read_log, summarize
from fuzzing.cases import UnreadableError
from fuzzing.child import Canary
canary = Canary((Path({inside!r}),))
canary.is_armed = True
Path({inside!r}, "kept").write_text("x")
Path({inside!r}, "folder").mkdir()
Path({inside!r}, "kept").read_text()
print(len(canary.seen))
for attempt in (
    lambda: os.system("true"), lambda: Path({outside!r}).write_text("x"), lambda: Path({outside!r}).unlink(),
    lambda: os.mkdir({outside!r}), lambda: os.rename(Path({inside!r}, "kept"), {outside!r}),
    lambda: socket.create_connection(("127.0.0.1", 9), 0.1), lambda: pickle.loads(b"cos\\ngetcwd\\n."),
    lambda: os.posix_spawn("/bin/true", ["true"], {{}}), lambda: os.open({outside!r}, os.O_WRONLY | os.O_CREAT),
):
    before = len(canary.seen)
    try:
        attempt()
    except OSError:
        pass
    print(len(canary.seen) > before)
"""


@pytest.mark.slow
def test_the_canary_sees_what_a_command_must_not_do(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    values = {"bench": str(ROOT / "bench"), "inside": str(tmp_path / "in"), "outside": str(tmp_path / "outside")}
    result = subprocess.run([sys.executable, "-c", CANARY.format(**values)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", *["True"] * 9]


@pytest.mark.slow
def test_the_oracle_agrees_with_the_package_on_a_whole_net(tmp_path: Path) -> None:
    net = build(load_checkpoint(checkpoints.checkpoint_file(tmp_path)))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for form in (net, fuse(net)):
        with torch.no_grad():
            assert compare_logits(form(images), compute_logits(checkpoints.make_tensors(), images)) is None


def test_the_oracle_sees_one_weight(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    tensors = read_tensors(checkpoints.checkpoint_file(tmp_path).read_bytes())
    wanted = compute_logits({key.removeprefix("state_dict."): value for key, value in tensors.items()}, images)
    tensors["state_dict.stage2.1.rbr_identity.weight"] *= 1.2
    assert "differ" in str(compare_logits(compute_logits(tensors, images), wanted))
    with pytest.raises(UnreadableError):
        compute_logits({}, images)


def test_the_oracle_reads_a_checkpoint_that_is_alone_in_an_archive(tmp_path: Path) -> None:
    content = checkpoints.checkpoint_file(tmp_path).read_bytes()
    one, other = (make_entry(name, content, 8) for name in (b"net.pth", b"other.pth"))
    tensors, wanted = read_tensors(write_zip(Zip((one,)))), read_tensors(content)
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    with pytest.raises(UnreadableError):
        read_tensors(write_zip(Zip((one, other))))


def test_archives_and_pickles_are_put_together_as_they_were(tmp_path: Path) -> None:
    content = checkpoints.checkpoint_file(tmp_path).read_bytes()
    (tmp_path / "again.pth").write_bytes(write_zip(read_zip(content)))
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert torch.equal(again["state_dict"]["linear.bias"], checkpoints.make_tensors()["linear.bias"])
    entry = next(each for each in read_zip(content).entries if each.local.name.endswith(b"data.pkl"))
    instructions, rest = split_pickle(entry.data)
    assert b"".join(instructions) + rest == entry.data


@pytest.mark.slow
def test_a_share_of_the_cases_ends_in_clear_errors_or_right_output(tmp_path: Path) -> None:
    log = tmp_path / "fuzz.jsonl"
    command = [sys.executable, "bench/fuzz.py", "run", "--cases", str(SHARE), "--seed", str(SEED), "--log", str(log)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    outcomes = Counter(row["outcome"] for row in rows)
    assert len(rows) == SHARE
    assert outcomes["error"] > SHARE / 5
    assert outcomes["success"] > SHARE / 10
    assert {row["format"] for row in rows} == {form.name for form in FORMATS["foreign"]}
    assert sum(row["checked"] for row in rows) > 10
    summary = summarize(read_log(log))
    assert summary["cases"] == SHARE
    assert sum(sum(each["outcomes"].values()) for each in summary["formats"].values()) == SHARE
    assert summary["failures"] == []


@pytest.mark.exhaustive
def test_a_share_of_the_cases_of_own_files_passes(tmp_path: Path) -> None:
    log = tmp_path / "fuzz.jsonl"
    command = [sys.executable, "bench/fuzz.py", "run", "--kind", "own", "--cases", "24", "--log", str(log)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    rows = read_log(log)
    assert Counter(row["format"] for row in rows) == {form.name: 8 for form in FORMATS["own"]}
    assert sum(row["checked"] for row in rows) > 16
    assert {"success", "error"} <= {row["outcome"] for row in rows}


def lay_out(interrupted: own._Interrupted, folder: Path) -> Path:
    out = folder / "out"
    for name, content in interrupted.lay_out().items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    interrupted.finish(folder)
    return out


def interrupted_sets() -> list[own._Interrupted]:
    made = [own._journal(Random(number)).prepare for number in range(400)]
    return [each.__self__ for each in made if each is not None and each.__self__.is_true]


def test_sets_whose_journal_is_whole_are_settled(tmp_path: Path) -> None:
    for number, interrupted in enumerate(interrupted_sets()[:40]):
        out = lay_out(interrupted, tmp_path / str(number))
        assert interrupted.check(False, out, out) == "the set was left unsettled"
        finish_interrupted(out)
        assert interrupted.check(False, out, out) is None, interrupted


def test_the_oracle_of_journals_sees_what_is_lost_or_mixed(tmp_path: Path) -> None:
    interrupted = next(each for each in interrupted_sets() if (each.name, each.moved) == ("journal", 2))
    out = lay_out(interrupted, tmp_path)
    work = next(out.glob(".repvgg-deploy-*"))
    damaged = replace(interrupted, is_true=False, damage=1)
    assert damaged.check(True, out, out) is None
    moved = out / "net.onnx"
    content = moved.read_bytes()
    moved.write_bytes(b"other")
    assert damaged.check(True, out, out) == "the set was left, and net.onnx is another"
    assert replace(interrupted, is_true=False).check(True, out, out) == "net.onnx is neither the old nor the new one"
    moved.write_bytes(content)
    shutil.rmtree(work)
    assert damaged.check(True, out, out) == "a damaged journal was dropped with the files of its set"
    assert interrupted.check(False, out, out) == "the set is not settled"
    (out / "kept.txt").unlink()
    assert interrupted.check(False, out, out) == "a file of nobody's was touched"


def test_a_failed_command_must_leave_all_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    assert own._check_untouched({"a": b"1"}, tmp_path, tmp_path) is None
    for before in ({"a": b"2"}, {}, {"a": b"1", "b": b""}):
        assert own._check_untouched(before, tmp_path, tmp_path)


def test_a_log_has_the_last_row_of_each_case_whole_or_not_at_all(tmp_path: Path) -> None:
    log = tmp_path / "fuzz.jsonl"
    log.write_text('{"number": 1, "outcome": "failed"}\n{"number": 2}\n{"number": 1, "outcome": "error"}\n{"numb')
    assert read_log(log) == [{"number": 1, "outcome": "error"}, {"number": 2}]
