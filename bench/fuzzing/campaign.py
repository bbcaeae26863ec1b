"""Many cases, one after the other: which they are, what became of them, and the record of it."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from fuzzing import checkpoints, graphs, own, paths, pictures, texts
from fuzzing.cases import Case, Format
from fuzzing.child import Result, require_one_thread, run_case
from fuzzing.verdict import Verdict, judge

Kind = Literal["foreign", "own"]
FORMATS: Mapping[Kind, tuple[Format, ...]] = {
    "foreign": (*checkpoints.FORMATS, *graphs.FORMATS, *texts.FORMATS, *pictures.FORMATS, *paths.FORMATS),
    "own": own.FORMATS,
}
"""Files that come from elsewhere, and those that the package itself leaves and reads again."""
_ROUNDS = {kind: tuple(each for each in formats for _ in range(each.weight)) for kind, formats in FORMATS.items()}
_COMMON_MESSAGES = 12


@dataclass(frozen=True)
class Outcome:
    """A case that was run."""

    number: int
    format: str
    case: Case
    result: Result
    verdict: Verdict

    def to_row(self) -> dict[str, Any]:
        """What the log keeps of it."""
        return {
            "number": self.number,
            "format": self.format,
            "outcome": self.verdict.outcome,
            "reason": self.verdict.reason,
            "message": self.verdict.message,
            "mutation": self.case.mutation,
            "command": self.case.arguments[0],
            "checked": self.result.checked,
            "cpu_s": round(self.result.cpu_s, 3),
            "wall_s": round(self.result.wall_s, 3),
            "peak_bytes": self.result.peak_bytes,
        }


def format_of(kind: Kind, number: int) -> Format:
    """The format of the case with this number: all of a kind in turn, by their weights."""
    return _ROUNDS[kind][number % len(_ROUNDS[kind])]


def make_case(kind: Kind, seed: int, number: int) -> Case:
    """The case of a seed with this number; always the same one."""
    return format_of(kind, number).make(Random(f"{seed}/{number}"))


def warm_up(folder: Path) -> None:
    """Load what the cases need, by running whole inputs in this process; it must have one thread afterwards."""
    import click
    import matplotlib.font_manager  # noqa: F401 (its list of fonts is made by a process)
    import torch

    import repvgg_deploy.workflows.qat  # noqa: F401 (not run: training starts threads)
    from repvgg_deploy.cli.main import main
    from repvgg_deploy.graphs import simplification

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    # The same check, in the process itself: it would start one for each case.
    _check_in_process(simplification)
    folder.mkdir(parents=True, exist_ok=True)
    net, graph = checkpoints.checkpoint_file(folder), folder / "whole.fp32.onnx"
    for name, content in graphs.class_folders().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    commands = (
        ("export", str(net), "-o", str(folder), "--engine", "none", "--size", "32", "-q", "--json"),
        ("inspect", str(graph), "--json"),
        ("verify", str(net), str(graph), "--json"),
        ("predict", str(graph), str(folder / "data"), "-o", str(folder / "rows.jsonl"), "--json"),
        ("bench", str(graph), "--duration", "0", "--warmup", "0", "--iterations", "1", "--json"),
    )
    for command in commands:
        try:
            with redirect_stdout(io.StringIO()):
                main.main(list(command), prog_name="repvgg-deploy", standalone_mode=False)
        except (click.exceptions.Exit, SystemExit) as end:
            code = end.exit_code if isinstance(end, click.exceptions.Exit) else end.code
            if code not in (0, None):
                raise RuntimeError(f"the whole input fails: {' '.join(command)}") from end
    gc.collect()
    gc.freeze()
    require_one_thread()


def _check_in_process(module: Any) -> None:
    import onnxsim  # noqa: F401

    def start(self: Any) -> None:
        self.answer = None

    def submit(self: Any, model: Any) -> None:
        self.answer = module.find_simplification(model)

    def require(self: Any) -> None:
        if self.answer is not None:
            raise module.GraphError(f"the graph could not be checked by onnxsim: {self.answer}", "pip install onnxsim")

    check = module.SimplificationCheck
    check.__init__, check.submit, check.require = start, submit, require
    check.__exit__ = lambda *_: None


def run_cases(kind: Kind, seed: int, numbers: Iterable[int], folder: Path) -> Iterator[Outcome]:
    """Run cases in turn, in a scratch folder."""
    for number in numbers:
        case = make_case(kind, seed, number)
        result = run_case(case, folder / "case")
        yield Outcome(number, format_of(kind, number).name, case, result, judge(result))


def keep_failure(outcome: Outcome, folder: Path) -> None:
    """Write the files of a case and what was printed, to look at."""
    place = folder / f"{outcome.number}"
    for folder_name, files in (("in", outcome.case.files), ("out", outcome.case.before)):
        for name, content in files.items():
            path = place / folder_name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    lines = [
        f"{outcome.format}: {outcome.case.mutation}",
        f"repvgg-deploy {' '.join(outcome.case.arguments)}",
        outcome.verdict.reason,
        outcome.result.crash,
        *outcome.result.violations,
        "--- standard output",
        outcome.result.stdout[-3000:],
        "--- standard error",
        outcome.result.stderr[-3000:],
    ]
    (place / "what.txt").write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")


def run_campaign(kind: Kind, seed: int, cases: int, log: Path, seconds: float) -> int:
    """Run the cases that the log lacks or that failed, until `seconds` have passed; how many there are in it then."""
    done = {row["number"] for row in read_log(log) if row["outcome"] != "failed"} if log.exists() else set()
    end = time.monotonic() + seconds
    log.parent.mkdir(parents=True, exist_ok=True)
    commit = _commit()
    scratch = log.absolute().with_suffix("")
    missing = (number for number in range(cases) if number not in done)
    with log.open("a", encoding="utf-8") as file:
        for outcome in run_cases(kind, seed, missing, scratch / str(os.getpid())):
            file.write(json.dumps({**outcome.to_row(), "commit": commit}) + "\n")
            file.flush()
            done.add(outcome.number)
            if outcome.verdict.outcome == "failed":
                keep_failure(outcome, scratch / "failed")
            if time.monotonic() > end:
                break
    return len(done)


def _commit() -> str:
    """The commit that the cases are run on, with `+` where the package has other changes."""
    words = (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "repvgg_deploy"))
    try:
        head, changes = (
            subprocess.run(["git", *each], capture_output=True, text=True, check=True).stdout.strip() for each in words
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def read_log(log: Path) -> list[dict[str, Any]]:
    """The last row of each case in a log; one that was cut off by a kill is left out."""
    rows: dict[int, dict[str, Any]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            rows[row["number"]] = row
    return list(rows.values())


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by format and outcome, the messages, times and memory."""
    formats: dict[str, Any] = {}
    for each in (each for kind in FORMATS.values() for each in kind):
        own = [row for row in rows if row["format"] == each.name]
        if not own:
            continue
        messages = Counter(row["message"] for row in own if row["message"])
        formats[each.name] = {
            "cases": len(own),
            "outcomes": dict(sorted(Counter(row["outcome"] for row in own).items())),
            "outputs_checked": sum(row["checked"] for row in own),
            "distinct_messages": len(messages),
            "most_common_messages": dict(messages.most_common(_COMMON_MESSAGES)),
            "cpu_s": round(sum(row["cpu_s"] for row in own), 1),
            "longest_cpu_s": max(row["cpu_s"] for row in own),
            "peak_bytes": max(row["peak_bytes"] for row in own),
        }
    return {
        "cases": len(rows),
        "outcomes": dict(sorted(Counter(row["outcome"] for row in rows).items())),
        "outputs_checked": sum(row["checked"] for row in rows),
        "commits": dict(Counter(row["commit"] for row in rows)),
        "distinct_messages": len({row["message"] for row in rows if row["message"]}),
        "cpu_s": round(sum(row["cpu_s"] for row in rows), 1),
        "wall_s": round(sum(row["wall_s"] for row in rows), 1),
        "longest_cpu_s": max((row["cpu_s"] for row in rows), default=0.0),
        "peak_bytes": max((row["peak_bytes"] for row in rows), default=0),
        "failures": [row for row in rows if row["outcome"] == "failed"][:50],
        "formats": formats,
    }
