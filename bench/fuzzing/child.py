"""A case in a process of its own, forked from one that has all libraries loaded, and watched."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from fuzzing.cases import Case, Check, UnreadableError

CPU_SECONDS = 10
WALL_SECONDS = 90
MEMORY = 2 << 30
_ADDRESSES_BEYOND = 1 << 30
"""Reserved but unused: stacks and arenas of threads, maps of files."""

_DEVICES = (Path("/dev/full"), Path("/proc/self"))
"""Where a case may ask for output that nothing can be written to."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATH_EVENTS = {
    "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.chmod": 1,
    "os.truncate": 1, "os.chown": 1, "os.utime": 1, "shutil.rmtree": 1,
}  # fmt: skip
_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen",
    "pty.spawn", "pickle.find_class", "webbrowser.open",
    "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request",
    "ftplib.connect", "smtplib.connect",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of a case.

    Attributes:
        status: the exit status; negative for a signal, None where the process was ended for its time.
        crash: the traceback of an exception that reached the top.
        violations: what the canary saw.
        wrong: what the oracle says of the outputs of a success, or of what lies there after a failure; `checked` if it
            could say anything.
        cpu_s, peak_bytes: of the process; the memory is what came on top of the parent's.
    """

    status: int | None
    stdout: str
    stderr: str
    crash: str
    violations: tuple[str, ...]
    wrong: str
    checked: bool
    cpu_s: float
    wall_s: float
    peak_bytes: int


def run_case(case: Case, folder: Path) -> Result:
    """Run a case in `folder`, which is emptied first."""
    folder = folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("in", "out", "tmp"):
        (folder / name).mkdir(parents=True)
    for place, files in (("in", case.files), ("out", case.before)):
        for name, content in files.items():
            path = folder / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for name, kind in case.places.items():
        _make_place(folder / name, kind)
    if case.prepare is not None:
        case.prepare(folder)
    before = _listing(folder / "in")
    base, start = _resident(), time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_the_child(case, folder)
    status, usage, ended = _wait(pid, start)
    wall = time.monotonic() - start
    report = _read_report(folder / "report.json")
    violations = list(report["violations"])
    if _listing(folder / "in") != before:
        violations.append("the folder of the inputs was changed")
    printed = [(folder / name).read_bytes().decode("utf-8", "replace") for name in ("stdout", "stderr")]
    return Result(
        status=None if ended else status,
        stdout=printed[0],
        stderr=printed[1],
        crash=report["crash"],
        violations=tuple(violations),
        wrong=report["wrong"],
        checked=report["checked"],
        cpu_s=usage.ru_utime + usage.ru_stime,
        wall_s=wall,
        peak_bytes=max(0, usage.ru_maxrss * 1024 - base),
    )


def _make_place(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
        (path / "kept").write_bytes(b"x")
    elif kind == "file":
        path.write_bytes(b"x")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else path.with_name("nowhere"))


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    found = [(path, path.lstat()) for path in folder.rglob("*")]
    return sorted((str(path), status.st_size, status.st_mtime_ns) for path, status in found)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _wait(pid: int, start: float) -> tuple[int, resource.struct_rusage, bool]:
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage, False
        if time.monotonic() - start > WALL_SECONDS:
            os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            return os.waitstatus_to_exitcode(status), usage, True
        time.sleep(0.002)


def _read_report(path: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"crash": "", "violations": [], "wrong": "", "checked": False}
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty


class Canary:
    """An audit hook that notes what a command must not do; it sees Python's own calls, not those of C++ libraries."""

    def __init__(self, allowed: tuple[Path, ...]) -> None:
        self._allowed = tuple(os.path.realpath(path) for path in allowed)
        self.seen: list[str] = []
        self.is_armed = False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_armed:
            return
        if event in _FORBIDDEN and not _asks_git(event, arguments):
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & _WRITING
            if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and not self._is_allowed(path):
                self.seen.append(f"open {path!r:.200} {mode}")
        elif event == "os.mkdir" and Path(os.fsdecode(arguments[0])).is_dir():
            # Nothing is made.
            return
        elif event in _PATH_EVENTS:
            self.seen += [
                f"{event} {path!r:.200}" for path in arguments[: _PATH_EVENTS[event]] if not self._is_allowed(path)
            ]

    def _is_allowed(self, path: Any) -> bool:
        if isinstance(path, int) or path == os.devnull:
            return True
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (TypeError, ValueError):
            # A path that cannot exist is not written to.
            return True
        return any(real == folder or real.startswith(folder + os.sep) for folder in self._allowed)


def _asks_git(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether it is the one process that a command starts: `bench` records the commit of a checkout."""
    return event == "subprocess.Popen" and arguments[0] == "git" and arguments[1][3] in ("rev-parse", "status")


def _be_the_child(case: Case, folder: Path) -> NoReturn:
    report: dict[str, Any] = {"crash": "", "violations": [], "wrong": "", "checked": False}
    status = 70
    try:
        _enter(folder)
        canary = Canary((folder / "out", folder / "tmp", *_DEVICES))
        _limit()
        canary.is_armed = True
        status, report["crash"] = _run_command(_arguments(case, folder))
        canary.is_armed = False
        check = case.check if status == 0 else case.after
        if check is not None:
            report["wrong"] = _check(check, folder)
            report["checked"] = report["wrong"] is not None
            report["wrong"] = report["wrong"] or ""
        report["violations"] = canary.seen[:20]
    finally:
        content = json.dumps(report)
        with (folder / "report.json").open("w", encoding="utf-8") as file:
            file.write(content)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _enter(folder: Path) -> None:
    """Standard streams into files, and a home and a temporary folder of the case's own."""
    os.chdir(folder / "out")
    for name, number in (("stdout", 1), ("stderr", 2)):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        os.environ[name] = str(folder / "tmp")
    tempfile.tempdir = str(folder / "tmp")


def _limit() -> None:
    sizes = Path("/proc/self/statm").read_text(encoding="ascii").split()
    room = int(sizes[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY + _ADDRESSES_BEYOND
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))


def _arguments(case: Case, folder: Path) -> list[str]:
    def place(argument: str) -> str:
        for word, name in (("IN", "in"), ("OUT", "out")):
            if argument == word or argument.startswith(f"{word}/"):
                return str(folder / name) + argument[len(word) :]
        return argument

    return [place(argument) for argument in case.arguments]


def _run_command(arguments: list[str]) -> tuple[int, str]:
    """The exit status of the command, and the traceback of what nobody caught."""
    from repvgg_deploy.cli.main import main
    from repvgg_deploy.cli.startup import silence_libraries

    silence_libraries()
    try:
        main.main(arguments, prog_name="repvgg-deploy")
    except SystemExit as end:
        return (end.code if isinstance(end.code, int) else 0 if end.code is None else 1), ""
    except BaseException:
        return 1, traceback.format_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _check(check: Check, folder: Path) -> str | None:
    """What the oracle says; None if it cannot tell."""
    try:
        return check(folder / "in", folder / "out") or ""
    except UnreadableError:
        return None
    except Exception:
        return f"the outputs cannot be checked: {traceback.format_exc()[-600:]}"


def require_one_thread() -> None:
    """Raise RuntimeError if this process has threads, which a fork would leave behind with their locks."""
    count = len(os.listdir("/proc/self/task"))  # noqa: PTH208 (names alone)
    if count != 1 or threading.active_count() != 1:
        raise RuntimeError(f"{count} threads run here: set OMP_NUM_THREADS=1 before the start")


def to_dict(result: Result) -> dict[str, Any]:
    """A result as JSON has it."""
    return asdict(result)
