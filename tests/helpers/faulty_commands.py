"""Commands that faults are injected into, and what is left of them: the files of one run, or of two."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from helpers.faults import Fault, install, run_child
from repvgg_deploy.checkpoints.writing import write_state_dict
from repvgg_deploy.engine.sidecar import read_sidecar
from repvgg_deploy.files import publishing
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.files.work_folders import WorkFolder, open_folder, remove_abandoned
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_request import ExportRequest

Check = Callable[[], None]
During = Callable[[], AbstractContextManager[Any]]
# What a run leaves on purpose, to go on from.
JOURNALS = (".partial", ".qat-state.pt")
_PREFIX = ".repvgg-deploy-"
_NOT_REACHED = 77
_SUITE = """
[measure]
warmup_s = 0.01
min_iterations = 2
min_duration_s = 0.02
min_rounds = 2
[[group]]
models = ["A0"]
backends = ["onnxruntime-cpu"]
batches = [1, 2]
"""


def make_inputs(folder: Path) -> Path:
    """Checkpoints `old/net.safetensors` and `new/net.safetensors`, their graphs, images and a suite."""
    source = data_folder("models") / "demo.safetensors"
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    last = next(name for name in reversed(tensors) if tensors[name].is_floating_point())
    for index, name in enumerate(("old", "new")):
        (folder / name).mkdir(parents=True)
        write_state_dict({**tensors, last: tensors[last] + index / 100}, folder / name / "net.safetensors", metadata)
        export(ExportRequest(folder / name / "net.safetensors", folder / name, engine="none"))
    write_image_folder(folder / "images", 24, seed=3, size=64)
    (folder / "suite.toml").write_text(_SUITE, encoding="utf-8")
    return folder


def commands(inputs: Path, run: str, out: Path) -> dict[str, list[str]]:
    """What is killed, by name; `run` is old or new. The last three write no file."""
    checkpoint, graph, images = inputs / run / "net.safetensors", inputs / run / "net.fp32.onnx", inputs / "images"
    found = {
        "export": ["export", checkpoint, "-o", out, "--engine", "tensorrt-rtx"],
        "export --engine none": ["export", checkpoint, "-o", out, "--engine", "none"],
        "export --int8": ["export", checkpoint, "-o", out, "--engine", "none", "--int8", "--calib", images,
                          "--recipe", "fast"],
        "fuse": ["fuse", checkpoint, "-o", out / "fused.pth"],
        "predict": ["predict", graph, images, "-o", out / "classes.jsonl"],
        "bench --suite": ["bench", "--suite", inputs / "suite.toml", "-o", out / f"{run}.json"],
        "package": ["package", graph, "--triton", "-o", out],
        "qat": ["qat", checkpoint, "--data", images, "--calib", images, "-o", out / "trained.safetensors",
                "--recipe", "fast", "--steps", "200", "--interval", "0.2", "--batch", "8"],
        "eval": ["eval", graph, "--data", images],
        "verify": ["verify", checkpoint, graph],
        "bench": ["bench", graph, "--baseline", "resnet18", "--duration", "0.2"],
    }  # fmt: skip
    return {name: [str(argument) for argument in arguments] for name, arguments in found.items()}


def snapshot(folder: Path) -> dict[str, str]:
    """The hash of each file below `folder`, without work folders and journals."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(JOURNALS)]
    names = {str(path.relative_to(folder)): path for path in files}
    return {name: hash_file(path) for name, path in sorted(names.items()) if _PREFIX not in name}


def judge(folder: Path, before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """`old`, `new` or `mixed`; a plan that is not its sidecar's, or a file of neither run, is mixed as well.

    `none` stands for a command that writes no file, if there is none.
    `after` is from another run of the same command: where figures of time are in a file, its hash is not this run's.
    """
    found = snapshot(folder)
    differing = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if not differing:
        return "mixed" if found else "none"
    changed = {found.get(name) != before.get(name) for name in differing}
    others_same = all(found.get(name) == before[name] for name in before.keys() - differing)
    is_known = found.keys() <= before.keys() | after.keys() and (found.keys() >= before.keys())
    plans_match = all(read_sidecar(plan).sha256 == found[plan.name] for plan in folder.glob("*.plan"))
    if len(changed) != 1 or not (others_same and is_known and plans_match):
        return "mixed"
    return "new" if changed.pop() else "old"


def has_leftovers(folder: Path, scratch: Path) -> bool:
    """Whether there is a work folder, or a temporary one; torch keeps an empty folder of its own there."""
    return any(folder.rglob(f"{_PREFIX}*")) or any(scratch.glob("repvgg-deploy-*"))


def begin_next_run(folder: Path, scratch: Path) -> None:
    """What every command does first."""
    publishing.finish_interrupted(folder)
    remove_abandoned(scratch, "repvgg-deploy-")


def run_program(arguments: Sequence[str]) -> tuple[int, str]:
    """The status of `repvgg-deploy` with these arguments, and what it says on standard error."""
    command = [sys.executable, "-m", "repvgg_deploy", *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


@dataclass(frozen=True)
class Publication:
    """What a fault at one call of one publication of a command left, then and after the next run."""

    files: tuple[str, ...]
    fault: str
    number: int
    status: int
    found: str
    found_next: str
    leftovers_next: bool


class FaultyPublishing:
    """In place of `publishing.publish`: a fault at each of its calls, on copies of the folder, before it is done.

    Of publications of the same files only the first is tried. `rows` is what was found.
    """

    def __init__(self, base: Path, faults: Mapping[str, Fault]) -> None:
        self.rows: list[Publication] = []
        self._base = base
        self._faults = faults
        self.real = publishing.publish
        self._seen = set[tuple[str, ...]]()

    def __call__(self, work: WorkFolder, folder: Path, check: Check, during: During) -> None:
        before, new = snapshot(folder), snapshot(work.path / "new")
        files = tuple(new)
        # Where nothing changes, old and new cannot be told apart.
        if files not in self._seen and before | new != before:
            self._seen.add(files)
            for name, fault in self._faults.items():
                number = 0
                while self._try(work, folder, check, during, (name, fault, number)):
                    number += 1
        self.real(work, folder, check, during)

    def _try(self, work: WorkFolder, folder: Path, check: Check, during: During, at: tuple[str, Fault, int]) -> bool:
        """Whether there was a call of this number."""
        (name, fault, number), new = at, snapshot(work.path / "new")
        copy = self._base / f"{len(self.rows)}"
        shutil.copytree(folder, copy, symlinks=True)
        path = copy / work.path.name

        def publish() -> None:
            own = WorkFolder(path, open_folder(path))
            fcntl.flock(own.descriptor, fcntl.LOCK_EX)
            calls = install(number, fault)
            try:
                self.real(own, copy, check, during)
            finally:
                own.release() if publishing.is_needed(path) else own.remove()
            if len(calls) <= number:
                os._exit(_NOT_REACHED)

        status, before = run_child(publish), snapshot(folder)
        states = {tuple(before.items()): "old", tuple(sorted((before | new).items())): "new"}
        found = states.get(tuple(snapshot(copy).items()), "mixed")
        publishing.finish_interrupted(copy)
        following = states.get(tuple(snapshot(copy).items()), "mixed")
        left = any(copy.rglob(f"{_PREFIX}*"))
        shutil.rmtree(copy)
        if status == _NOT_REACHED:
            return False
        self.rows.append(Publication(tuple(new), name, number, status, found, following, left))
        return True
