"""Mutated files that the package itself leaves and reads again: saved runs of `qat`, lock files, publish journals.

They lie where anyone may write. A command either ends with one clear error and leaves everything on the disk as it was,
or it gives what it would have given without the damage.
"""

from __future__ import annotations

import io
import json
import os
import re
import tomllib
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import onnx
import torch

from fuzzing.cases import Case, Format, UnreadableError
from fuzzing.checkpoints import mutate_archive, torch_bytes, whole_safetensors
from fuzzing.graphs import class_folders, whole_graph
from fuzzing.mutations import NAMES, choose_value, dumps, mutate_bytes, mutate_tree
from fuzzing.originals import EXPORT, QAT, STATE, input_files, originals
from fuzzing.texts import mutate_toml, write_toml

_EARLIER = b"of an earlier run"


def _files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _check_untouched(before: Mapping[str, bytes], _: Path, out: Path) -> str | None:
    """After an error everything is as it was."""
    found = _files_of(out)
    changed = [name for name in {*before, *found} if before.get(name) != found.get(name)]
    return f"the command failed, and {sorted(changed)[0]} is another" if changed else None


# The saved run of qat


def _state(rng: Random) -> Case:
    content, name = _mutate_state(originals().state, rng)
    before = {STATE: content, "trained.safetensors": _EARLIER}
    check = partial(_check_training, content)
    return Case(QAT, input_files(), name, check, before=before, after=partial(_check_stopped, before))


def _check_stopped(before: Mapping[str, bytes], inputs: Path, out: Path) -> str | None:
    """As `_check_untouched`, but what is saved may have gone on, where torch reads it and it was accepted."""
    saved = (out / STATE).read_bytes() if (out / STATE).is_file() else b""
    if saved != before[STATE] and _read_steps(saved) == 1 + _read_steps(before[STATE]):
        before = {**before, STATE: saved}
    return _check_untouched(before, inputs, out)


def _read_steps(state: bytes) -> int:
    """The steps that a saved run says were done; -2 if torch does not read it."""
    with suppress(Exception):
        return int(json.loads(torch.load(io.BytesIO(state), weights_only=True)["about"])["done"])
    return -2


def _mutate_state(content: bytes, rng: Random) -> tuple[bytes, str]:
    kind = rng.choice(("archive", "archive", "about", "about", "tensor", "none"))
    if kind == "none":
        return content, "none"
    if kind == "archive":
        return mutate_archive(content, rng)
    value = torch.load(io.BytesIO(content), weights_only=True)
    if kind == "about":
        about, name = mutate_tree(json.loads(value["about"]), rng)
        value["about"] = dumps(about)
        return torch_bytes(value), f"about: {name}"
    return _mutate_tensor(value, rng)


def _mutate_tensor(value: dict[str, Any], rng: Random) -> tuple[bytes, str]:
    """A whole file of which one tensor is another."""
    group = rng.choice(("training", "teacher", "best"))
    tensors = dict(value[group])
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(("nan", "huge", "negative", "shape", "type", "drop", "surplus", "name", "expand", "group"))
    if kind in ("nan", "huge"):
        tensors[name] = torch.full_like(tensor.float(), float("nan") if kind == "nan" else 1e38)
    elif kind == "negative":
        tensors[name] = -tensor.float().abs()
    elif kind == "shape":
        tensors[name] = rng.choice((tensor.flatten(), tensor[None], tensor.flatten()[:0]))
    elif kind == "type":
        tensors[name] = tensor.to(rng.choice((torch.float16, torch.float64, torch.int64, torch.bool)))
    elif kind == "drop":
        del tensors[name]
    elif kind == "surplus":
        tensors[rng.choice(NAMES)[:50]] = torch.zeros(1)
    elif kind == "name":
        tensors[rng.choice(NAMES)] = tensors.pop(name)
    elif kind == "expand":
        tensors[name] = tensor.flatten()[:1].float().expand(1 << rng.choice((4, 12, 31)))
    other: list[Any] = [tensor, name, list(tensors), {}, None]
    changed = {**value, group: rng.choice(other) if kind == "group" else tensors}
    return torch_bytes(changed), f"tensors: {kind} of {group}"


def _check_training(content: bytes, _: Path, out: Path) -> str | None:
    """A run that goes on ends as the unbroken one does; from other numbers in whole files it may end elsewhere.

    Raises:
        UnreadableError: the file is another, and nothing in it says so.
    """
    found = _files_of(out)
    if STATE in found:
        return "the saved run is left"
    names = ("trained.safetensors", "trained.scales.npz", "trained.curves.csv")
    missing = [name for name in names if found.get(name, _EARLIER) == _EARLIER]
    if missing:
        return f"there is no {missing[0]}"
    if all(found[name] == originals().outputs[name] for name in names):
        return None
    if _is_same(content):
        return "the run has ended elsewhere than the unbroken one"
    raise UnreadableError


def _is_same(content: bytes) -> bool:
    """Whether torch reads from a mutated state what the original has."""
    try:
        found, wanted = (torch.load(io.BytesIO(each), weights_only=True) for each in (content, originals().state))
        return bool(found["about"] == wanted["about"]) and all(
            found[group].keys() == wanted[group].keys()
            and all(torch.equal(found[group][name], tensor) for name, tensor in wanted[group].items())
            for group in ("training", "teacher", "best")
        )
    except Exception:
        return False


# Lock files

_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("output", "../stolen"), ("calib-cache", "../stolen.npz"), ("calib_cache", "../in/stolen.npz"),
    ("junit", "../x.xml"),
    ("lock", "../stolen.toml"), ("save-config", "../stolen.toml"), ("provenance", True), ("module", "os:system"),
    ("labels", "../in/recipe.toml"), ("verify-data", "../in/data"), ("opset", 18), ("batch", 2), ("fp16", True),
    ("size", "64"), ("softmax", True), ("topk", 3), ("uint8-input", True), ("all", True), ("from", "../in/deploy.toml"),
    ("config", "../in/deploy.toml"), ("json", True), ("engine", "tensorrt"), ("calib", "none"), ("count", 10**9),
    ("arch", "A0"), ("pretrained", "timm"), ("ckpt", "/dev/zero"), ("ckpt", "../in/data"), ("recipe", "thorough"),
)  # fmt: skip
"""Options that a stranger may put into a lock file."""


def _lock(rng: Random) -> Case:
    precision = rng.choice(("fp32", "fp32", "fp32", "int8"))
    content, name = _mutate_lock(originals().locks[f"{precision}.toml"], rng)
    before = {f"net.{precision}.onnx": _EARLIER}
    given = ("../in/net.safetensors",) if rng.random() < 0.3 else ()
    arguments = (EXPORT[0], *given, "--from", "../in/deploy.toml", "-o", ".")
    files = {**input_files(), "deploy.toml": content}
    check = partial(_check_graphs, precision)
    return Case(arguments, files, f"{precision}: {name}", check, before=before, after=partial(_check_untouched, before))


def _mutate_lock(content: bytes, rng: Random) -> tuple[bytes, str]:
    kind = rng.choice(("tree", "tree", "bytes", "option", "none"))
    if kind == "none":
        return content, "none"
    if kind == "bytes":
        changed, name = mutate_bytes(content, rng)
        return changed, f"bytes: {name}"
    tree = tomllib.loads(content.decode())
    if kind == "tree":
        return mutate_toml(tree, rng)
    key, value = rng.choice(_OPTIONS)
    tree["export"][key] = choose_value(rng, value) if rng.random() < 0.3 else value
    return write_toml(tree).encode("utf-8", "surrogatepass"), f"option {key}"


def _check_graphs(precision: str, _: Path, out: Path) -> str | None:
    """Whatever the lock says, the graph that was accepted is the one whose hash it has."""
    name = f"net.{precision}.onnx"
    found = _files_of(out)
    if found.pop(name, None) != originals().outputs[name]:
        return f"{name} is not the graph of the unbroken export"
    surplus = [other for other in found if not other.endswith(".provenance.json")]
    return f"there is {surplus[0]} as well" if surplus else None


# Journals of interrupted runs

_WORK = ".repvgg-deploy-0123456789abcdef"
_PATHS = ("fresh.txt", "net.onnx", "notes.txt", "sub/deep.txt")
_FRESH = "fresh.txt"
_BYSTANDER = "kept.txt"
# Stands for a number that only the disk can tell: of which path, the new or the old one, and which of the numbers.
_NUMBER = re.compile(rb"\b77(\d)(\d)(\d)00000\b")


@cache
def _contents() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What is in the places before and after the run."""
    model = onnx.ModelProto.FromString(whole_graph())
    model.producer_name = "another run"
    old = {path: f"old {path}".encode() for path in _PATHS if path != _FRESH} | {"net.onnx": whole_graph()}
    new = {path: f"new {path}".encode() for path in _PATHS} | {"net.onnx": model.SerializeToString()}
    return old, new


@dataclass(frozen=True)
class _Interrupted:
    """A set of which the first `moved` files have taken their places when its process was killed.

    Attributes:
        name: of the journal: `journal`, or `rollback` where the old files were being put back.
        between: the next file's old one is aside, and the new one is not there yet.
        links: the file system has hard links.
        text: the moves as JSON, with numbers that stand for those of the disk.
        damage: a seed, where bytes of the finished journal are damaged.
        is_true: nothing in it was changed.
    """

    name: str
    moved: int
    between: bool
    links: bool
    text: bytes
    damage: int | None
    is_true: bool

    def lay_out(self) -> dict[str, bytes]:
        """The files by name, but for hard links; those in the work folder are called by its name."""
        old, new = _contents()
        files = {f"{_WORK}/{self.name}": self.text, _BYSTANDER: b"kept", "sub/other.txt": b"kept"}
        for number, path in enumerate(_PATHS):
            if number < self.moved:
                files[path] = new[path]
            else:
                files[f"{_WORK}/new/{path}"] = new[path]
            if path in old and (number < self.moved or self._is_between(number)):
                files[f"{_WORK}/old/{path}"] = old[path]
            elif path in old:
                files[path] = old[path]
        return files

    def _is_between(self, number: int) -> bool:
        return self.between and number == self.moved

    def finish(self, folder: Path) -> None:
        """Link what is linked, and write the numbers of the disk and the checksum into the journal."""
        out = folder / "out"
        work, (old, _) = out / _WORK, _contents()
        for number, path in enumerate(_PATHS):
            for place in ("new", "old"):
                (work / place / path).parent.mkdir(parents=True, exist_ok=True)
            if self.links and path in old and number >= self.moved and not self._is_between(number):
                os.link(out / path, work / "old" / path)

        def look(match: re.Match[bytes]) -> bytes:
            number, is_old, which = (int(digit) for digit in match.groups())
            path = _PATHS[number]
            place = work / ("old" if is_old else "new") / path
            found = (place if place.exists() else out / path).stat()
            return str((found.st_ino, found.st_size, found.st_mtime_ns)[which]).encode()

        text = _NUMBER.sub(look, self.text)
        text = f"{zlib.crc32(text):08x} ".encode() + text
        if self.damage is not None:
            text, _ = mutate_bytes(text, Random(self.damage))
        (work / self.name).write_bytes(text)

    def check(self, failed: bool, _: Path, out: Path) -> str | None:
        """Undamaged sets are settled; of others nothing is lost, or what is in the places is what was or should be."""
        (old, new), before, found = _contents(), self.lay_out(), _files_of(out)
        places = {path: found.get(path) for path in _PATHS}
        if (found.get(_BYSTANDER), found.get("sub/other.txt")) != (b"kept", b"kept"):
            return "a file of nobody's was touched"
        if any(name.startswith(_WORK) for name in found):
            if not failed or self.is_true:
                return "the set was left unsettled"
            changed = [name for name in before if name != f"{_WORK}/{self.name}" and found.get(name) != before[name]]
            if changed and self.damage is not None:
                return f"the set was left, and {changed[0]} is another"
        elif self.is_true:
            begun = self.moved > 0 or (self.between and _PATHS[0] in old)
            wanted = new if self.name == "journal" and begun else old
            return None if places == {path: wanted.get(path) for path in _PATHS} else "the set is not settled"
        elif self.damage is not None:
            is_complete = all(places[path] == new[path] for path in _PATHS)
            return None if is_complete else "a damaged journal was dropped with the files of its set"
        # The checksum is right: whoever made the journal up may have the set dropped, and no more.
        odd = [path for path in _PATHS if places[path] not in (before.get(path), old.get(path), new[path])]
        return f"{odd[0]} is neither the old nor the new one" if odd else None


_COMMANDS = (
    ("fuse", "../in/net.safetensors", "-o", "other.safetensors"),
    ("predict", "net.onnx", "../in/data", "-o", "rows.jsonl"),
    ("verify", "net.onnx", "../in/whole.onnx"),
    ("eval", "net.onnx", "--data", "../in/data"),
)


def _journal(rng: Random) -> Case:
    old, _ = _contents()
    moved = rng.randrange(len(_PATHS) + 1)
    between = 0 < moved < len(_PATHS) and rng.random() < 0.4
    moves = [
        {
            "path": path,
            "new": [_stand_in(number, 0, which) for which in range(3)],
            "old": [_stand_in(number, 1, which) for which in range(3)] if path in old else None,
        }
        for number, path in enumerate(_PATHS)
    ]
    kind = rng.choice(("none", "bytes", "bytes", "tree", "tree"))
    tree, name = mutate_tree(moves, rng) if kind == "tree" else (moves, kind)
    damage = rng.randrange(1 << 32) if kind == "bytes" else None
    text = dumps(tree).encode()
    interrupted = _Interrupted(
        rng.choice(("journal", "journal", "rollback")), moved, between, rng.random() < 0.6, text, damage, kind == "none"
    )
    files = {"net.safetensors": whole_safetensors(), "whole.onnx": whole_graph(), **class_folders()}
    return Case(
        rng.choice(_COMMANDS),
        files,
        f"{interrupted.name} after {moved}{' and a half' if between else ''}: {name}",
        partial(interrupted.check, False),
        before=interrupted.lay_out(),
        prepare=interrupted.finish,
        after=partial(interrupted.check, True),
    )


def _stand_in(number: int, is_old: int, which: int) -> int:
    return int(f"77{number}{is_old}{which}00000")


FORMATS = (Format("saved run of qat", _state), Format("lock file", _lock), Format("publish journal", _journal))
