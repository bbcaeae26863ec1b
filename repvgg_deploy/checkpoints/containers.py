"""Files to named tensors: every container a checkpoint comes in, and never a line of code executed from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repvgg_deploy.checkpoints.archives import Archive, open_archive
from repvgg_deploy.checkpoints.inert import Inert, attributes_of, to_plain
from repvgg_deploy.checkpoints.known_globals import StoredArray
from repvgg_deploy.checkpoints.npz_files import ArrayError, read_npz
from repvgg_deploy.checkpoints.other_files import describe_archive, describe_other_file
from repvgg_deploy.checkpoints.safetensors_files import HeaderError, read_safetensors
from repvgg_deploy.checkpoints.settings_values import is_text
from repvgg_deploy.checkpoints.sources import EndsEarlyError, MemorySource, Source, read_bytes
from repvgg_deploy.checkpoints.stored import Storage, StoredTensor
from repvgg_deploy.checkpoints.torch_files import Tree, read_pickles, read_torch_archive
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable

_MAX_DEPTH = 40
_MAX_NAMES = 500_000
_MAX_LIST = 64
_MEMBERS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar", ".pkl")


@dataclass(frozen=True)
class Contents:
    """All that a file holds.

    Attributes:
        tensors: by name, where the keys of dicts and the attributes of objects around a tensor are joined by dots.
        places: the part of each name that is around the dict in which the tensor lies.
        modules: by name, the records of torch modules, where the file is a pickle of such; `tensors` are theirs.
        configuration: the rest as plain data, see `Checkpoint`.
        class_names: what the file says of the classes.
        notes: what a user should know of the file.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, Inert] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def read_contents(source: Source, path: Path, is_inner: bool = False) -> Contents:
    """What a `.pth`, `.pt`, `.pth.tar`, `.ckpt`, `.npz`, `.pkl` or `.safetensors` file holds; no tensor is read yet.

    The format is told by the file's first bytes, not by its name. A zip file with one of these in it is read as well.

    Raises:
        CheckpointError: the file is truncated, damaged, or something else.
    """
    shown = printable(str(path))
    head = read_bytes(source, 0, 512)
    # A safetensors file begins with eight bytes of length, and a JSON object.
    if head[8:9] == b"{":
        try:
            tensors, metadata = read_safetensors(source)
        except (HeaderError, EndsEarlyError) as error:
            raise _damaged(shown, error, "safetensors file") from error
        return replace(_collect(Tree(tensors, {}), metadata), configuration=dict(metadata))
    if head[:2] == b"PK":
        return _read_zip(open_archive(source, shown), path, is_inner)
    # The instruction PROTO, with which pickles begin from protocol 2 on, and the protocol.
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return _read_tree(lambda: read_pickles(source), shown)
    raise describe_other_file(head, path)


def _read_zip(archive: Archive, path: Path, is_inner: bool) -> Contents:
    shown = printable(str(path))
    other = describe_archive(archive.names, path)
    if other is not None:
        raise other
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.names):
        contents = _read_tree(lambda: read_torch_archive(archive), shown)
        if not archive.has_checksums:
            note = "the file was saved without checksums, so damage to its weights cannot be detected"
            contents = replace(contents, notes=(*contents.notes, note))
        return contents
    if any(name.endswith(".npy") for name in archive.names):
        try:
            return _collect(Tree(read_npz(archive), {}), {})
        except ArrayError as error:
            hint = "save the weights alone: numpy.savez('ckpt.npz', **weights)"
            raise CheckpointError(f"{shown}: {error}", hint) from error
    members = [name for name in archive.names if name.lower().endswith(_MEMBERS)]
    if len(members) != 1:
        found = f"; it holds {', '.join(map(printable, members[:4]))}" if members else ""
        raise CheckpointError(
            f"{shown} is a zip archive without a checkpoint in it{found}", "unpack it and give the checkpoint inside"
        )
    if is_inner:
        raise CheckpointError(f"{shown} is an archive of an archive", "unpack it and give the checkpoint inside")
    return read_contents(MemorySource(archive.read(members[0])), path / members[0], is_inner=True)


def _read_tree(read: Any, shown: str) -> Contents:
    try:
        tree: Tree = read()
    except CheckpointError:
        raise
    except Exception as error:
        # A damaged pickle is a corrupted program, so reading it can raise nearly any exception.
        raise _damaged(shown, error, "checkpoint") from error
    return _collect(tree, {})


def _damaged(shown: str, error: Exception, kind: str) -> CheckpointError:
    reason = printable((str(error) or type(error).__name__).splitlines()[0])
    return CheckpointError(f"{shown} is a truncated or damaged {kind} ({reason})", "download or copy it again")


def _collect(tree: Tree, metadata: Mapping[str, str]) -> Contents:
    """The named tensors of a file, and what it says beside them."""
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, str] = {}
    modules: dict[str, Inert] = {}
    for place, name, value in _walk(tree.value):
        if isinstance(value, Inert):
            modules[name] = value
        elif name not in tensors:
            tensors[name], places[name] = value, place
    plain = to_plain(tree.value, lambda value: isinstance(value, StoredTensor | StoredArray | Storage))
    configuration = dict(attributes_of(plain))
    return Contents(
        tensors, places, modules, configuration, _class_names(configuration, metadata), _unread_notes(tree.unread)
    )


def _unread_notes(unread: Mapping[str, int]) -> tuple[str, ...]:
    if not unread:
        return ()
    names = ", ".join(printable(name, 80) for name in list(unread)[:3]) + (", …" if len(unread) > 3 else "")
    return (f"everything other than tensors was read as data, not executed: {names}",)


def _walk(root: Any) -> Iterator[tuple[str, str, StoredTensor | Inert]]:
    """Place, full name and value of each tensor and each module record in a tree; cycles end, depth is bounded."""
    # Depth first and in the file's order, without recursion.
    stack = [_Step(root, "", "", (), False)]
    for _ in range(_MAX_NAMES):
        if not stack:
            return
        step = stack.pop()
        item: Any = step.value.tensor if isinstance(step.value, StoredArray) else step.value
        if isinstance(item, StoredTensor):
            if step.name:
                yield step.place, step.name, item
            continue
        if id(item) in step.around or len(step.around) > _MAX_DEPTH:
            continue
        is_module = _is_module(item)
        # All tensors of a module lie in one place, as in its state dict.
        place = step.place if is_module and step.in_module else step.name
        if is_module:
            yield place, step.name, item
        around = (*step.around, id(item))
        stack += reversed(
            [
                _Step(child, f"{step.name}.{key}" if step.name else key, place, around, is_module)
                for key, child in _children(item, is_module)
            ]
        )


@dataclass(frozen=True)
class _Step:
    value: Any
    name: str
    place: str
    around: tuple[int, ...]
    in_module: bool


def _is_module(record: Any) -> bool:
    return (
        isinstance(record, Inert)
        and isinstance(record.state, Mapping)
        and "_modules" in record.state
        and "_parameters" in record.state
    )


def _children(item: Any, is_module: bool) -> list[tuple[str, Any]]:
    """What a container holds by name, as far as it may lead to tensors."""
    if is_module:
        parts = attributes_of(item)
        temporary = parts.get("_non_persistent_buffers_set")
        left_out = set(map(str, temporary)) if isinstance(temporary, list) else set()
        groups = (attributes_of(parts.get(kind)) for kind in ("_parameters", "_buffers", "_modules"))
        return [(name, child) for group in groups for name, child in group.items() if name not in left_out]
    if isinstance(item, list | tuple):
        return [(str(index), child) for index, child in enumerate(item[:_MAX_LIST]) if _may_hold(child)]
    return [(name, child) for name, child in attributes_of(item).items() if _may_hold(child)]


def _may_hold(value: Any) -> bool:
    return isinstance(value, StoredTensor | StoredArray | Mapping | list | tuple | Inert)


def _class_names(configuration: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    meta = attributes_of(configuration.get("meta"))
    places = [_parse_metadata(metadata), configuration, meta, attributes_of(meta.get("dataset_meta"))]
    for place in places:
        for key in ("class_names", "CLASSES", "classes"):
            names = place.get(key)
            if isinstance(names, list | tuple) and names and all(is_text(name) for name in names):
                return tuple(names)
    return None


def _parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The class names in the metadata of a safetensors file, if they are JSON; others write there what they like."""
    try:
        return {"class_names": json.loads(metadata.get("class_names", "null"))}
    except (ValueError, RecursionError):
        return {}
