"""A set of files that is published with a fault at each system call: what is left, before and after the next run.

    python -m helpers.publishing_faults KIND BEFORE FOLDER

prints one JSON object per call. In a process of its own, without torch: it forks once per call.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from helpers.faults import Fault, count_calls, fail, install, run_child, send
from repvgg_deploy.cli.signals import end_on_signals
from repvgg_deploy.files.publishing import finish_interrupted
from repvgg_deploy.files.staging import stage_files

OLD = {"net.onnx": "old graph", "net.plan": "old plan", "net.plan.json": "old sidecar", "entry/config": "old"}
# A folder that is there already gets what is in it; one that is not is moved as a whole.
NEW = {
    "net.onnx": "graph", "net.plan": "plan", "net.plan.json": "sidecar",
    "entry/config": "new", "entry/2/model": "second", "images/1/model": "first",
}  # fmt: skip
BEFORE = {"nothing": {"other": "kept"}, "old": {"other": "kept", **OLD}}
PREFIX = ".repvgg-deploy-"


@dataclass(frozen=True)
class Left:
    """What a fault at one call left: `old`, `new` or `mixed` files, then and after the next run.

    `work` says whether a work folder was left; `work_next` whether the next run left one.
    """

    number: int
    call: str
    status: int
    found: str
    work: bool
    found_next: str
    work_next: bool


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    """The files by their paths, without those of work folders."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = {str(path.relative_to(folder)): path.read_text() for path in files}
    return {name: text for name, text in texts.items() if not name.startswith(PREFIX)}


def has_work(folder: Path) -> bool:
    return any(path.name.startswith(PREFIX) for path in folder.iterdir())


def publish(folder: Path) -> None:
    with stage_files(folder) as staging:
        write(staging, NEW)


def _with_fault(fault: Fault, is_command: bool, lasting: bool, folder: Path, number: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if is_command:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        end_on_signals()
    install(number, fault, lasting)
    publish(folder)


def _finish_killed(number_before: int, folder: Path, number: int) -> None:
    """A process that is killed between two renames, then one that is killed while it completes the set."""
    run_child(partial(_with_fault, send(signal.SIGKILL), False, False, folder, number_before))
    install(number, send(signal.SIGKILL))
    finish_interrupted(folder)


KINDS: dict[str, Callable[[Path, int], None]] = {
    "error": partial(_with_fault, fail, False, False),
    "broken-disk": partial(_with_fault, fail, False, True),
    "sigkill": partial(_with_fault, send(signal.SIGKILL), False, False),
    **{
        f"{number.name.lower()}-{name}": partial(_with_fault, send(number), name == "command", False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for name in ("command", "python")
    },
}


def _state(folder: Path, before: dict[str, str]) -> str:
    found = read(folder)
    return "old" if found == before else "new" if found == before | NEW else "mixed"


def try_each_call(kind: str, before: dict[str, str], base: Path) -> list[Left]:
    """Publish the set once per system call that this takes, with a fault of `kind` there."""
    write(base / "dry", before)
    calls = [*count_calls(lambda: publish(base / "dry")), "end"]
    work, results = KINDS.get(kind), []
    if work is None:
        assert kind == "sigkill-next"
        renames = [number for number, call in enumerate(calls) if call == "os.rename"]
        # The first one is the journal's.
        work = partial(_finish_killed, renames[3])
        calls = ["?"] * len(calls)
    for number, call in enumerate(calls):
        folder = base / str(number)
        write(folder, before)
        status = run_child(partial(work, folder, number))
        found, left = _state(folder, before), has_work(folder)
        finish_interrupted(folder)
        results.append(Left(number, call, status, found, left, _state(folder, before), has_work(folder)))
    return results


def _refuse_links(*_: object, **__: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def main() -> None:
    kind, before, base = sys.argv[1:4]
    if "no-links" in sys.argv[4:]:
        os.link = _refuse_links
    for row in try_each_call(kind, BEFORE[before], Path(base)):
        print(json.dumps(asdict(row)))


if __name__ == "__main__":
    main()
