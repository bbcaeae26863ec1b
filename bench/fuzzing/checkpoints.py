"""Mutated checkpoints given to `export`, `fuse` and `inspect`, and what their logits must be."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fuzzing.cases import Case, Check, Format, UnreadableError
from fuzzing.mutations import NAMES, mutate_bytes
from fuzzing.oracle import compare_logits, compute_logits, pictures, read_tensors, run_graph
from fuzzing.pickles import mutate_pickle
from fuzzing.weights import mutate_npz, mutate_safetensors, write_npz
from fuzzing.zips import make_entry, mutate_zip, read_zip, write_zip

_BLOCKS = ((1, 4, 3), (1, 4, 4), (2, 6, 4), (1, 6, 6), (1, 8, 6))
"""Of each stage: blocks, width, width of what comes before."""
_CLASSES = 5
# A string of digits in a pickle, as long as an address in memory.
_KEY = re.compile(rb"X(.)\0\0\0(\d{8,20})", re.DOTALL)


@cache
def make_tensors(seed: int = 3) -> dict[str, Tensor]:
    """A small net in training form, under the official code's names, with statistics as after training."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def add_norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = torch.empty(width).uniform_(0.4, 1.2, generator=generator)
        tensors[f"{name}.bias"] = torch.empty(width).normal_(0, 0.2, generator=generator)
        tensors[f"{name}.running_mean"] = torch.empty(width).normal_(0, 0.3, generator=generator)
        tensors[f"{name}.running_var"] = torch.empty(width).uniform_(0.3, 3.0, generator=generator)
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(1000)

    for stage, (blocks, width, before) in enumerate(_BLOCKS):
        for block in range(blocks):
            name, fan = f"stage{stage}.{block}" if stage else "stage0", before if block == 0 else width
            for branch, kernel in (("rbr_dense", 3), ("rbr_1x1", 1)):
                weight = torch.empty(width, fan, kernel, kernel)
                tensors[f"{name}.{branch}.conv.weight"] = weight.normal_(
                    0, (2 / fan) ** 0.5 / kernel, generator=generator
                )
                add_norm(f"{name}.{branch}.bn", width)
            if block:
                add_norm(f"{name}.rbr_identity", width)
    tensors["linear.weight"] = torch.empty(_CLASSES, width).normal_(0, 0.5, generator=generator)
    tensors["linear.bias"] = torch.empty(_CLASSES).normal_(0, 0.1, generator=generator)
    return tensors


@cache
def expected_logits() -> Tensor:
    """The logits in float64 of the net that nothing was done to."""
    return compute_logits(make_tensors(), pictures())


@dataclass(frozen=True)
class _Kind:
    ending: str
    write: Callable[[dict[str, Tensor]], bytes]
    mutate: Callable[[bytes, Random], tuple[bytes, str]]


def torch_bytes(value: Any, new: bool = True) -> bytes:
    """A value as torch saves it, in its zip format or the one before."""
    stream = io.BytesIO()
    # Storages lie in the file in the order of their addresses in memory, if they are sorted.
    with patch("torch.serialization.sorted", list, create=True):
        torch.save(value, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue() if new else _with_fixed_keys(stream.getvalue())


def _with_fixed_keys(content: bytes) -> bytes:
    """A file whose storages are called by their number: torch calls them by where they were in memory."""
    keys = dict.fromkeys(key for size, key in _KEY.findall(content) if size == bytes([len(key)]))
    for number, key in enumerate(keys):
        content = content.replace(key, b"%0*d" % (len(key), number))
    return content


def _wrapped(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """As trainers save: the net beside its optimizer's state and settings."""
    settings = {"arch": "repvgg", "epoch": 3, "class_names": [f"class {n}" for n in range(_CLASSES)]}
    return {"state_dict": tensors, **settings, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


def mutate_archive(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A file of torch's zip format with another archive, another pickle or other bytes."""
    kind = rng.choice(("zip", "zip", "pickle", "pickle", "pickle", "bytes", "nested"))
    if kind == "bytes":
        changed, name = mutate_bytes(content, rng)
        return changed, f"bytes: {name}"
    archive = read_zip(content)
    if kind == "zip":
        changed_archive, name = mutate_zip(archive, rng)
        if rng.random() < 0.2:
            changed_archive, other = mutate_zip(changed_archive, rng)
            name += f" + {other}"
        return write_zip(changed_archive), f"zip: {name}"
    if kind == "nested":
        inner = write_zip(mutate_zip(archive, rng)[0]) if rng.random() < 0.5 else content
        name = rng.choice(("a.pth", "b.safetensors", *NAMES[1:4]))
        entry = make_entry(name.encode(), inner, rng.choice((0, 8)))
        return write_zip(type(archive)((entry,))), "zip: an archive in an archive"
    entries = list(archive.entries)
    place = next(n for n, entry in enumerate(entries) if entry.local.name.endswith(b"data.pkl"))
    data, name = mutate_pickle(entries[place].data, rng)
    entries[place] = make_entry(entries[place].local.name, data)
    return write_zip(type(archive)(tuple(entries))), f"pickle: {name}"


def _mutate_pickles(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A file of several pickles, of which the one with the tensors is mutated, or any byte."""
    if rng.random() < 0.25:
        changed, name = mutate_bytes(content, rng)
        return changed, f"bytes: {name}"
    starts, place = [0], 0
    while len(starts) < 5 and place < len(content):
        try:
            place += _pickle_length(content[place:])
        except (ValueError, IndexError):
            break
        starts.append(place)
    start = starts[min(len(starts) - 1, rng.choice((0, 3, 3, 4)))] if len(starts) > 2 else 0
    try:
        changed, name = mutate_pickle(content[start:], rng)
    except (ValueError, IndexError):
        changed, name = mutate_bytes(content[start:], rng)
    return content[:start] + changed, f"pickle: {name}"


def _pickle_length(content: bytes) -> int:
    stream = io.BytesIO(content)
    import pickletools

    for _ in pickletools.genops(stream):
        pass
    return stream.tell()


_KINDS = {
    "torch zip": _Kind("pth", lambda tensors: torch_bytes(_wrapped(tensors)), mutate_archive),
    "torch legacy": _Kind("pth", lambda tensors: torch_bytes(_wrapped(tensors), new=False), _mutate_pickles),
    "pickle": _Kind(
        "pkl", lambda tensors: pickle.dumps({k: v.numpy() for k, v in tensors.items()}, 4), _mutate_pickles
    ),
    "safetensors": _Kind("safetensors", lambda tensors: _safetensors_bytes(tensors), mutate_safetensors),
    "npz": _Kind("npz", write_npz, lambda content, rng: _mutate_npz_file(content, rng)),
}


def _safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save(tensors, {"class_names": '["a","b","c","d","e"]', "format": "pt"})


def _mutate_npz_file(content: bytes, rng: Random) -> tuple[bytes, str]:
    kind = rng.choice(("npy", "npy", "zip", "bytes"))
    if kind == "npy":
        return mutate_npz(content, rng)
    if kind == "zip":
        archive, name = mutate_zip(read_zip(content), rng)
        return write_zip(archive), f"zip: {name}"
    changed, name = mutate_bytes(content, rng)
    return changed, f"bytes: {name}"


@cache
def _whole(kind: str) -> bytes:
    return _KINDS[kind].write(make_tensors())


def _damaged_tensors(rng: Random) -> tuple[dict[str, Tensor], str]:
    """A net whose tensors themselves are odd; the file is whole."""
    tensors = dict(make_tensors())
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(("nan", "inf", "huge", "tiny", "shape", "type", "drop", "surplus", "name", "negative", "expand"))
    if kind in ("nan", "inf", "huge", "tiny"):
        value = {"nan": float("nan"), "inf": float("inf"), "huge": 1e30, "tiny": 1e-38}[kind]
        tensors[name] = (
            tensor.clone().double().fill_(value) if rng.random() < 0.3 else torch.full_like(tensor.float(), value)
        )
    elif kind == "shape":
        tensors[name] = rng.choice(
            (tensor.flatten(), tensor[None], tensor.flatten()[:0], torch.cat([tensor[None]] * 2))
        )
    elif kind == "type":
        tensors[name] = tensor.to(
            rng.choice((torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.complex64))
        )
    elif kind == "drop":
        del tensors[name]
    elif kind == "surplus":
        tensors |= {f"{rng.choice(NAMES)[:50]}.{n}": torch.zeros(1) for n in range(rng.choice((1, 10, 2_000)))}
    elif kind == "name":
        tensors[rng.choice((rng.choice(NAMES), f"{name}\n", f"x.{name}", name.upper()))] = tensors.pop(name)
    elif kind == "negative":
        tensors[name] = -tensor.float().abs()
    else:
        tensors[name] = tensor.flatten()[:1].float().expand(1 << rng.choice((4, 12, 31)))
    return tensors, f"tensors: {kind}"


def _make(kind: str, rng: Random) -> Case:
    how = _KINDS[kind]
    if rng.random() < 0.15 and kind not in ("safetensors", "pickle", "npz"):
        tensors, mutation = _damaged_tensors(rng)
        content = torch_bytes(tensors, kind == "torch zip")
    else:
        content, mutation = how.mutate(_whole(kind), rng)
    name = f"net.{how.ending}"
    command, check = _command(name, content, rng)
    return Case(command, {name: content}, mutation, check)


def _command(name: str, content: bytes, rng: Random) -> tuple[tuple[str, ...], Check | None]:
    as_json = ("--json",) if rng.random() < 0.2 else ()
    kind = rng.choice(("export", "export", "export", "fuse", "inspect"))
    if kind == "export":
        arguments = ("export", f"IN/{name}", "-o", "OUT", "--engine", "none", "--size", "32", *as_json)
        return arguments, lambda _, out: _check_logits(content, lambda: run_graph(next(out.glob("*.onnx")), pictures()))
    if kind == "fuse":
        ending = rng.choice(("pth", "safetensors"))
        return ("fuse", f"IN/{name}", "-o", f"OUT/fused.{ending}", *as_json), lambda _, out: _check_logits(
            content, lambda: compute_logits(read_tensors((out / f"fused.{ending}").read_bytes()), pictures())
        )
    return ("inspect", f"IN/{name}", *as_json), None


def _check_logits(content: bytes, run: Callable[[], Tensor]) -> str | None:
    """Hold what was written against the file's tensors; where no library reads them, against the net before.

    Raises:
        UnreadableError: neither tells, as nothing in the file would show that its weights are others.
    """
    found = run()
    try:
        wanted = compute_logits(read_tensors(content), pictures())
    except UnreadableError as error:
        wrong = compare_logits(found, expected_logits())
        if wrong is not None and content[:2] != b"PK":
            raise
        return None if wrong is None else f"{wrong}; its own library says: {error}"
    return compare_logits(found, wanted)


def _maker(kind: str) -> Callable[[Random], Case]:
    return lambda rng: _make(kind, rng)


FORMATS = (
    Format("checkpoint, zip", _maker("torch zip"), 4),
    Format("checkpoint, legacy", _maker("torch legacy"), 2),
    Format("checkpoint, pickle", _maker("pickle"), 2),
    Format("safetensors", _maker("safetensors"), 3),
    Format("npz", _maker("npz"), 2),
)


def whole_safetensors() -> bytes:
    """The whole net as a safetensors file."""
    return _whole("safetensors")


def checkpoint_file(folder: Path) -> Path:
    """The whole net as a file."""
    path = folder / "whole.pth"
    path.write_bytes(_whole("torch zip"))
    return path
