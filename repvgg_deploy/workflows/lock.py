"""`deploy.toml`: everything that made the files of an export, and whether another run has the same before it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.files.typed_values import Sha256, convert, parse_toml, read_file, to_toml

if TYPE_CHECKING:
    from repvgg_deploy.artifacts import Precision
    from repvgg_deploy.workflows.export_request import ExportRequest, Int8Request

VERSION = 1
_HINT = "give a file that `export --lock` wrote"
_UNREADABLE = "unreadable"
# No image is larger; what is, counts as unreadable here as it does in calibration.
_MOST_BYTES = 1 << 31


@dataclass(frozen=True)
class LockedFile:
    """A file that an export read: where it was, and its sha256."""

    path: str
    sha256: Sha256


@dataclass(frozen=True)
class LockedImages:
    """The calibration images that were taken.

    `files` has `SHA256  NAME` for each, in their order, the name being relative to `source`; `sha256` is that of these
    lines, each ending in a newline, which is what `sha256sum` prints of them.
    """

    source: str
    sha256: Sha256
    files: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """Everything that an export reads; None for what it does not."""

    checkpoint: LockedFile
    calibration: LockedImages | None = None
    recipe: LockedFile | None = None
    scales: LockedFile | None = None
    labels: LockedFile | None = None

    def require_same(self, expected: Inputs, lock: Path) -> None:
        """Raise DeployError unless these are the inputs that the lock file expects.

        Raises:
            DeployError: names the first input that differs, and how.
        """
        for what in ("checkpoint", "recipe", "scales", "labels"):
            mine, theirs = getattr(self, what), getattr(expected, what)
            if (mine and mine.sha256) != (theirs and theirs.sha256):
                raise DeployError(_describe_difference(what, mine, theirs, lock), _OTHER_INPUT.format(what, lock))
        if self.calibration != expected.calibration:
            difference = _describe_images(self.calibration, expected.calibration)
            if difference:
                raise DeployError(
                    f"the calibration images are not those of {lock}: {difference}",
                    "give the same images: --calib DIR; or export without --from to make another artifact",
                )


_OTHER_INPUT = "give the {} that {} was written with, or export without --from to make another artifact"


def _describe_difference(what: str, mine: LockedFile | None, theirs: LockedFile | None, lock: Path) -> str:
    if mine is None or theirs is None:
        return f"{lock} was written {'with' if theirs else 'without'} {what}, and this export is not"
    return f"the {what} {mine.path} is not the one of {lock}: its sha256 is {mine.sha256}, not {theirs.sha256}"


def _describe_images(mine: LockedImages | None, theirs: LockedImages | None) -> str:
    """How two lists of images differ, in words; empty if they have the same images under the same names."""
    if mine is None or theirs is None:
        return "there are none" if mine is None else "it has none"
    here, there = _by_name(mine), _by_name(theirs)
    lists = {
        "is missing": [name for name in there if name not in here],
        "is new": [name for name in here if name not in there],
        "differs": [name for name in there if name in here and here[name] != there[name]],
    }
    names = [f"{name} {how}" for how, found in lists.items() for name in found]
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else ""


def _by_name(images: LockedImages) -> dict[str, str]:
    """The sha256 of each image."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in images.files)}


def read_inputs(request: ExportRequest, precisions: tuple[Precision, ...], labels: Path | None) -> Inputs:
    """Hash everything that the export reads: the checkpoint, and what INT8 is calibrated with.

    Raises:
        DeployError: a file cannot be read.
    """
    from repvgg_deploy.artifacts import Precision

    checkpoint = _lock_file(request.checkpoint)
    int8 = request.int8 if Precision.INT8 in precisions else None
    locked_labels = None if labels is None else _lock_file(labels)
    if int8 is None:
        return Inputs(checkpoint, labels=locked_labels)
    if int8.scales is not None:
        return Inputs(checkpoint, scales=_lock_file(int8.scales), labels=locked_labels)
    return Inputs(checkpoint, _lock_images(int8), _lock_recipe(int8), labels=locked_labels)


def _lock_file(path: Path) -> LockedFile:
    try:
        return LockedFile(str(path), hash_file(path))
    except FileNotFoundError as error:
        raise DeployError(f"there is no file {path}", "check the path") from error
    except OSError as error:
        raise DeployError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error


def _lock_recipe(int8: Int8Request) -> LockedFile:
    from repvgg_deploy.quantization.recipe import find_recipe

    return LockedFile(str(int8.recipe), _lock_file(find_recipe(int8.recipe)).sha256)


def _lock_images(int8: Int8Request) -> LockedImages | None:
    if int8.images is None:
        return None
    from repvgg_deploy.errors import ImageError
    from repvgg_deploy.images.sources import read_source
    from repvgg_deploy.quantization.calibration_images import choose_sources
    from repvgg_deploy.quantization.recipe import load_recipe

    recipe = load_recipe(int8.recipe)
    lines = []
    for source in choose_sources(int8.images, int8.count or recipe.count, recipe.seed):
        try:
            digest = hashlib.sha256(read_source(source, _MOST_BYTES)).hexdigest()
        except ImageError:
            digest = _UNREADABLE
        name = str(source).removeprefix(f"{int8.images}/")
        lines.append(f"{digest}  {name}")
    text = "".join(f"{line}\n" for line in lines)
    # A name that is not UTF-8 counts by its bytes, as `sha256sum` prints it.
    return LockedImages(
        str(int8.images), hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(), tuple(lines)
    )


@dataclass(frozen=True)
class Lock:
    """What a lock file says.

    Attributes:
        options: those of `export`, by name, as on its command line.
        inputs: the files that were read.
        settings: what no tensor tells, as it was chosen.
        artifacts: the sha256 of each ONNX graph, by its name.
        tools: the versions.
    """

    options: dict[str, Any]
    inputs: Inputs
    settings: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Header:
    version: int


def write_lock(lock: Lock, path: Path) -> None:
    """Write a lock file."""
    inputs = {name: values for name, values in asdict(lock.inputs).items() if values is not None}
    tables = {"settings": lock.settings, "artifacts": lock.artifacts, "tools": lock.tools}
    head = "# Everything that made these files. Again, byte for byte: repvgg-deploy export --from FILE\n"
    text = to_toml({"lock": {"version": VERSION}, "export": lock.options, **inputs, **tables})
    path.write_text(head + text, encoding="utf-8", errors="surrogateescape")


def read_lock(path: Path) -> Lock:
    """The lock in a file.

    Raises:
        DeployError: it cannot be read, is no lock file, or one of a newer release.
    """
    try:
        values = parse_toml(read_file(path, str(path), _HINT), str(path), _HINT)
    except FileNotFoundError as error:
        raise DeployError(f"there is no file {path}", _HINT) from error
    version = convert(values.pop("lock", {}), _Header, f"{path}: lock", _HINT).version
    if version != VERSION:
        raise DeployError(f"{path} has the version {version}, but this release reads {VERSION}", _HINT)
    names = ("checkpoint", "calibration", "recipe", "scales", "labels")
    inputs = {name: values.pop(name) for name in names if name in values}
    return convert({"options": values.pop("export", {}), "inputs": inputs, **values}, Lock, str(path), _HINT)


def require_settings(settings: Mapping[str, str], lock: Lock, path: Path) -> None:
    """Raise DeployError unless everything that no tensor tells was chosen as it was for the lock file."""
    for name, value in settings.items():
        if lock.settings.get(name) != value:
            raise DeployError(
                f"{name.replace('_', ' ')} is {value}, but {lock.settings.get(name)} in {path}",
                "a configuration beside the checkpoint, or a card of another release, decides it: set it by option",
            )


def require_artifact(graph: Path, lock: Lock, path: Path, tools: Mapping[str, str]) -> None:
    """Raise DeployError unless the ONNX graph is, byte for byte, the one that the lock file records."""
    expected = lock.artifacts.get(graph.name)
    if expected is None:
        known = ", ".join(lock.artifacts) or "none"
        raise DeployError(f"{path} records no {graph.name}, but {known}", "leave the name of the checkpoint as it was")
    if hash_file(graph) == expected:
        return
    changed = [
        f"{name} {lock.tools.get(name, 'none')}, now {tools.get(name, 'none')}"
        for name in sorted({*lock.tools, *tools})
        if lock.tools.get(name) != tools.get(name)
    ]
    raise DeployError(
        f"{graph.name} differs from the one that {path} records, though its inputs are the same",
        f"install the versions that made it: {'; '.join(changed)}"
        if changed
        else "INT8 depends on the CPU and on the number of threads: set OMP_NUM_THREADS as it was",
    )
