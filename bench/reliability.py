"""Faults on purpose: killed commands, full disks, several runs in one folder, long runs. Each writes a record.

    python bench/reliability.py calls
    python bench/reliability.py kill --tries 200
    python bench/reliability.py disk --points 50
    python bench/reliability.py concurrent
    python bench/reliability.py soak --exports 500 --inferences 100000

`kill` sends SIGKILL, SIGTERM, SIGINT and SIGHUP to commands at random moments; `calls` does so, and lets calls fail, at
each system call of the publishing. Afterwards there are the files of the run before or those of this run, never of
both, and once the next run has begun nothing else. `disk` mounts a tmpfs. The net is the embedded one.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from repvgg_deploy.engine.sidecar import read_sidecar
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.hardware.cpu import read_cpu
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_request import ExportRequest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.faulty_commands import (  # type: ignore[import-not-found]
    begin_next_run,
    commands,
    has_leftovers,
    judge,
    make_inputs,
    run_program,
    snapshot,
)
from helpers.interrupt import Interrupted, interrupt  # type: ignore[import-not-found]
from helpers.publishing_faults import BEFORE, KINDS, try_each_call  # type: ignore[import-not-found]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How long a command may run on after a signal and still succeed: to leave the interpreter takes about a second.
_LONGEST_END_S = 3.0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("bench/results"), show_default=True)
@click.pass_context
def main(context: click.Context, output: Path) -> None:
    """Inject faults, and write a record of what was left."""
    context.obj = output


def write_record(kind: str, values: Mapping[str, Any], start: float) -> None:
    """Write the JSON record, named after the kind and the day, and end with status 1 if there were faults."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    record = {
        "kind": f"reliability-{kind}",
        "date": date,
        "machine": {"cpu": read_cpu().model, "cores": os.cpu_count(), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "tensorrt-rtx")},
        "seconds": round(time.monotonic() - start),
        **values,
    }
    folder: Path = click.get_current_context().obj
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"cpu-{date}-reliability-{kind}.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{target}: {'faults' if record['faults'] else 'no fault'}")
    sys.exit(bool(record["faults"]))


@main.command()
@click.option("--tries", type=click.IntRange(min=1), default=200, show_default=True, help="Of all commands together.")
@click.option("--only", multiple=True, help="A command; repeatable.")
@click.option("--seed", type=int, default=0)
def kill(tries: int, only: Sequence[str], seed: int) -> None:
    """End commands by signals at random moments."""
    start, draw = time.monotonic(), random.Random(seed)
    with tempfile.TemporaryDirectory() as base:
        inputs = make_inputs(Path(base) / "inputs")
        names = only or list(commands(inputs, "new", Path()))
        rows = []
        for index, name in enumerate(names):
            count = tries * (index + 1) // len(names) - tries * index // len(names)
            rows.append(kill_command(name, inputs, Path(base) / f"runs{index}", count, draw))
            click.echo(json.dumps(rows[-1]))
    write_record("kill", {"tries": tries, "faults": sum(len(row["faults"]) for row in rows), "commands": rows}, start)


def kill_command(name: str, inputs: Path, base: Path, tries: int, draw: random.Random) -> dict[str, Any]:
    """Kill one command `tries` times where its last run has left files: its row of the table."""

    def run(which: str, folder: Path, number: signal.Signals, delay: float) -> Interrupted:
        return interrupt(commands(inputs, which, folder / "out")[name], folder, number, delay)

    # SIGCONT changes nothing.
    for which in ("old", "new"):
        if which == "new":
            shutil.copytree(base / "old" / "out", base / "new" / "out")
        (base / which / "out").mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        ended = run(which, base / which, signal.SIGCONT, 0.0)
        seconds = time.monotonic() - begun
        if ended.status:
            raise click.ClickException(f"{name} fails by itself: {ended.stderr}")
    before, after = snapshot(base / "old" / "out"), snapshot(base / "new" / "out")
    counts, faults = Counter[str](), list[dict[str, Any]]()
    for _ in range(tries):
        number, folder = draw.choice(SIGNALS), base / "try"
        delay = draw.uniform(0.0, seconds)
        shutil.copytree(base / "old" / "out", folder / "out")
        ended = run("new", folder, number, delay)
        state = judge(folder / "out", before, after)
        # A suite writes its record after each case, to go on from.
        unfinished = ("old", "none", "new") if name == "bench --suite" else ("old", "none")
        fault = _fault_of(ended, state, unfinished, has_leftovers(folder / "out", folder / "tmp"))
        begin_next_run(folder / "out", folder / "tmp")
        following = judge(folder / "out", before, after)
        if following == "mixed" or has_leftovers(folder / "out", folder / "tmp"):
            fault = f"{following} after the next run began, which left {snapshot(folder)}"
        counts[f"{number.name} {ended.status} {state}"] += 1
        if fault is not None:
            faults.append({"signal": number.name, "delay_s": round(delay, 3), "fault": fault})
        shutil.rmtree(folder)
    return {"command": name, "tries": tries, "faults": faults, "outcomes": dict(sorted(counts.items()))}


def _fault_of(ended: Interrupted, state: str, unfinished: Sequence[str], leftovers: bool) -> str | None:
    """What is wrong with how a command ended, or None; a mixed set is mended later only if it was killed."""
    number, killed = ended.number, ended.number == signal.SIGKILL
    expected = (0, -number) if killed else (0, 128 + number)
    if ended.status not in expected:
        return f"status {ended.status}: {ended.stderr[-300:]}"
    if ended.seconds_to_end > 10 and ended.status:
        return f"took {ended.seconds_to_end:.1f} s to end"
    if killed:
        return None
    # Once its files are published a command may end well, but then little is left to do.
    if ended.status == 0 and ended.seconds_to_end > _LONGEST_END_S:
        return f"ignored the signal and went on for {ended.seconds_to_end:.1f} s"
    if leftovers:
        return f"left behind: {', '.join(ended.left)}"
    if state not in (("new", "none") if ended.status == 0 else unfinished):
        return f"{state} files after status {ended.status}"
    is_aborted = ended.stderr.endswith("\nAborted!\n") and "Traceback" not in ended.stderr
    return None if is_aborted or ended.status == 0 else f"stderr ends with {ended.stderr[-200:]!r}"


@main.command()
def calls() -> None:
    """End a process, or let a call fail, at each system call of the publishing of a set."""
    start, rows, faults = time.monotonic(), [], 0
    for kind in (*KINDS, "sigkill-next"):
        for before in BEFORE:
            with tempfile.TemporaryDirectory() as base:
                found = try_each_call(kind, BEFORE[before], Path(base))
            outcomes = Counter(f"{row.status} {row.found}, then {row.found_next}" for row in found)
            bad = sum(row.found_next == "mixed" or row.work_next for row in found)
            faults += bad
            rows.append({"kind": kind, "before": before, "calls": len(found), "faults": bad, "outcomes": outcomes})
            click.echo(json.dumps(rows[-1]))
    write_record("calls", {"faults": faults, "kinds": rows}, start)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes at `folder`.

    Raises:
        OSError: mounting is not allowed.
    """
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_disk(folder: Path, points: int, inputs: Path) -> dict[str, Any]:
    """Export `new` over `old` on a tmpfs in `folder` that has room for less than all of it, `points` times."""
    counts, faults = Counter[str](), list[str]()
    reference, scratch = folder / "whole", folder / "tmp"
    scratch.mkdir()
    arguments = {run: commands(inputs, run, folder / "disk" / "out")["export"] for run in ("old", "new")}
    with small_disk(folder / "disk", 64 << 20) as disk:
        out = disk / "out"
        for run in ("old", "new"):
            status, said = run_program(arguments[run])
            assert status == 0, said
            shutil.copytree(out, reference / run)
        before, after = snapshot(reference / "old"), snapshot(reference / "new")
        needed = int(1.5 * sum(path.stat().st_size for path in (reference / "new").iterdir()))
        for point in range(points):
            shutil.rmtree(out)
            shutil.copytree(reference / "old", out)
            filler = disk / "filler"
            with filler.open("wb") as file:
                room = shutil.disk_usage(disk).free - needed * point // max(points - 1, 1)
                os.posix_fallocate(file.fileno(), 0, max(room, 1))
            status, said = run_program(arguments["new"])
            state = judge(out, before, after)
            is_clear = status == 0 or ("error: " in said and "No space left" in said and "Traceback" not in said)
            expected = {0: "new", 1: "old"}.get(status)
            if state != expected or not is_clear or has_leftovers(out, scratch):
                faults.append(f"room for {point} of {points - 1}: status {status}, {state} files, {said[-300:]}")
            counts[f"status {status}, {state}"] += 1
            filler.unlink()
    return {"points": points, "needed_bytes": needed, "faults": faults, "outcomes": dict(counts)}


@main.command()
@click.option("--points", type=click.IntRange(min=2), default=50, show_default=True)
def disk(points: int) -> None:
    """Let the disk run full during an export with an engine."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        found = fill_disk(Path(base), points, make_inputs(Path(base) / "inputs"))
    write_record("disk", found, start)


def run_together(base: Path, inputs: Sequence[Path], folder: Path) -> list[str]:
    """Export checkpoints into one folder at the same time, with one timing cache; what is wrong afterwards.

    A checkpoint of the same name is one of several writers of the same set.
    """
    logs = [base / f"stderr{number}" for number in range(len(inputs))]
    base.mkdir()
    os.environ["XDG_CACHE_HOME"] = str(base / "cache")
    children = []
    for checkpoint, log in zip(inputs, logs, strict=True):
        arguments = ["export", str(checkpoint), "-o", str(folder), "--engine", "tensorrt-rtx"]
        with log.open("wb") as file:
            command = [sys.executable, "-m", "repvgg_deploy", *arguments]
            children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file))
    statuses = [child.wait() for child in children]
    ended = zip(statuses, logs, strict=True)
    faults = [f"status {status}: {log.read_text()[-300:]}" for status, log in ended if status]
    for checkpoint in {*inputs}:
        plan = folder / f"{checkpoint.stem}.fp32.plan"
        side = read_sidecar(plan)
        if (side.sha256, side.onnx_sha256) != (hash_file(plan), hash_file(plan.with_suffix(".onnx"))):
            faults.append(f"{plan.name}, its graph and its sidecar are of different runs")
        sources = {hash_file(each) for each in inputs if each.stem == checkpoint.stem}
        if side.provenance is None or side.provenance.sha256 not in sources:
            faults.append(f"{plan.name} is not of its checkpoint")
    left = {path.name for path in folder.iterdir()}
    expected = {f"{each.stem}.fp32.{ending}" for each in inputs for ending in ("onnx", "plan", "plan.json")}
    return faults if left == expected else [*faults, f"found {sorted(left)}"]


@main.command()
@click.option("--runs", type=click.IntRange(min=2), default=8, show_default=True)
def concurrent(runs: int) -> None:
    """Export different checkpoints into one folder at once, then the same one, then build with one timing cache."""
    start, rows = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as base:
        inputs = make_inputs(Path(base) / "inputs")
        different = [inputs / f"net{number}.safetensors" for number in range(runs)]
        for number, path in enumerate(different):
            shutil.copyfile(inputs / ("old", "new")[number % 2] / "net.safetensors", path)
        cases = {
            "different checkpoints": different,
            "the same checkpoint": [different[0]] * runs,
            "two checkpoints of one name": [inputs / run / "net.safetensors" for run in ("old", "new")] * (runs // 2),
            "two builds, one timing cache": different[:2],
        }
        for index, (name, paths) in enumerate(cases.items()):
            faults = run_together(Path(base) / str(index), paths, Path(base) / f"out{index}")
            rows.append({"case": name, "runs": len(paths), "faults": faults})
            click.echo(json.dumps(rows[-1]))
    write_record("concurrent", {"faults": sum(len(row["faults"]) for row in rows), "cases": rows}, start)


def resident_bytes() -> int:
    """The memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_growth(step: Callable[[], Any], count: int, samples: int = 50) -> dict[str, Any]:
    """How the memory changes while `step` is done `count` times: the last tenth against the second tenth."""
    held = []
    for number in range(count):
        step()
        if (number + 1) * samples // count > number * samples // count:
            held.append(resident_bytes())
    tenth = max(1, len(held) // 10)
    growth = statistics.median(held[-tenth:]) / statistics.median(held[tenth : 2 * tenth]) - 1
    return {"count": count, "growth_percent": round(100 * growth, 2), "resident_mib": [size >> 20 for size in held]}


@main.command()
@click.option("--exports", type=click.IntRange(min=10), default=500, show_default=True)
@click.option("--inferences", type=click.IntRange(min=10), default=100_000, show_default=True)
@click.option("--max-growth", type=float, default=2.0, show_default=True, help="In percent; more is a fault.")
def soak(exports: int, inferences: int, max_growth: float) -> None:
    """Export many times in one process, and run one model many times: memory stays flat."""
    start, rows = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as base:
        inputs = make_inputs(Path(base) / "inputs")
        request = ExportRequest(inputs / "new" / "net.safetensors", Path(base) / "out", engine="none")
        runner = OnnxRunner(inputs / "new" / "net.fp32.onnx")
        images = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
        rows["inferences"] = measure_growth(lambda: runner.run(images), inferences)
        click.echo(json.dumps(rows["inferences"]))
        rows["exports"] = measure_growth(lambda: export(request), exports)
        click.echo(json.dumps(rows["exports"]))
    faults = [name for name, row in rows.items() if row["growth_percent"] > max_growth]
    write_record("soak", {"faults": faults, **rows}, start)


if __name__ == "__main__":
    main()
