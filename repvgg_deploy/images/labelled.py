"""Images with their classes, in the layouts that ImageNet and its kin are found in."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from repvgg_deploy.errors import DeployError, ImageError
from repvgg_deploy.files.typed_values import read_file
from repvgg_deploy.images.archives import TarMember, index_archive
from repvgg_deploy.images.sources import ARCHIVES, SUFFIXES, ImageSource, Tally, Unreadable, find_images, walk_folder

_LAYOUTS = "expected DIR/<class>/<image>.jpg, tar archives, or a flat folder with a ground-truth file"
_MAP = "map_clsloc.txt"
# A line per image, of millions.
_MOST_BYTES = 256 << 20
# With fewer digits any number fits 64 bits.
_MOST_DIGITS = 19


@dataclass(frozen=True)
class LabelledImages:
    """Images with the index of their class.

    `labels` index `class_names`, which are in sorted order; where that is None, they are the model's own indices.
    `unreadable` are folders and archives with images that cannot be found.
    """

    paths: tuple[ImageSource, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] | None
    unreadable: tuple[Unreadable, ...] = ()


def list_labelled_images(source: Path, ground_truth: Path | None = None) -> LabelledImages:
    """The images of `source` with their classes.

    `source` is a folder with one folder per class; a tar archive, a pattern or a folder of them, whose classes are
    the members' folders, the inner archives' names, WebDataset's `.cls` members, or else the archives' names; or,
    with a ground-truth file, whatever `find_images` takes.

    Raises:
        ImageError: there is no such folder, it is in none of these layouts, or the ground truth does not fit.
    """
    if ground_truth is not None:
        return _with_ground_truth(find_images([source]), ground_truth)
    if not source.is_dir():
        if source.suffix.lower() not in ARCHIVES:
            raise ImageError(f"there is no folder {source}", "give a folder with one folder of images per class")
        return _from_archives(_match(source), source)
    folders, entries = _enter(source)
    classes = tuple(sorted(p.name for p in folders if not p.name.startswith(".")))
    tally = Tally()
    found = [(image, label) for label, name in enumerate(classes) for image in walk_folder(source / name, tally)]
    if any(not isinstance(image, Unreadable) for image, _ in found):
        return _collect(found, classes)
    archives = sorted(p for p in entries if p.suffix.lower() in ARCHIVES)
    if not archives:
        raise ImageError(f"{source} contains no images in class folders", _LAYOUTS)
    return _from_archives(archives, source)


def _enter(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders in a folder, and everything in it; a folder may be listed and yet not be entered."""
    try:
        entries = list(folder.iterdir())
        return [entry for entry in entries if entry.is_dir()], entries
    except OSError as error:
        raise ImageError(f"{folder} cannot be read ({error.strerror})", "check its permissions") from error


def _match(source: Path) -> list[Path]:
    if source.exists():
        return [source]
    matches = sorted(source.parent.glob(source.name))
    if not matches:
        raise ImageError(f"there is no archive {source}", _LAYOUTS)
    return matches


def _collect(found: Iterable[tuple[ImageSource, int]], classes: tuple[str, ...] | None) -> LabelledImages:
    images = [(image, label) for image, label in found if not isinstance(image, Unreadable)]
    unreadable = tuple(image for image, _ in found if isinstance(image, Unreadable))
    return LabelledImages(tuple(image for image, _ in images), tuple(label for _, label in images), classes, unreadable)


def _from_archives(archives: Sequence[Path], source: Path) -> LabelledImages:
    images: list[TarMember] = []
    unreadable: list[Unreadable] = []
    indices: dict[str, int] = {}
    for archive in archives:
        index = index_archive(archive)
        images += [member for member in index.members if Path(member.name).suffix.lower() in SUFFIXES]
        for member in index.members:
            if member.name.endswith(".cls"):
                indices[_sample_key(member)] = _read_index(member)
        if index.problem is not None:
            unreadable.append(Unreadable(archive, index.problem))
    if not images:
        raise ImageError(f"there is no image in {source}", unreadable[0].reason if unreadable else _LAYOUTS)
    if indices:
        missing = next((image for image in images if _sample_key(image) not in indices), None)
        if missing is not None:
            raise ImageError(f"{missing} has no class", "give each sample of the shards a .cls member")
        labels = tuple(indices[_sample_key(image)] for image in images)
        return LabelledImages(tuple(images), labels, None, tuple(unreadable))
    names = [_class_of(image, len(archives) > 1) for image in images]
    if None in names:
        raise ImageError(f"{images[names.index(None)]} has no class", "give its ground-truth file")
    classes = tuple(sorted({name for name in names if name is not None}))
    number = {name: label for label, name in enumerate(classes)}
    return LabelledImages(
        tuple(images), tuple(number[name] for name in names if name is not None), classes, tuple(unreadable)
    )


def _sample_key(member: TarMember) -> str:
    """What the members of one WebDataset sample have in common: the path up to the first dot of the file's name."""
    path = PurePosixPath(member.name)
    return f"{member.archive}/{path.parent}/{path.name.split('.')[0]}"


def _read_index(member: TarMember) -> int:
    hint = "a .cls member holds one number"
    try:
        text = member.read()[:32].strip()
    except (OSError, ValueError, OverflowError) as error:
        raise ImageError(f"{member} cannot be read", hint) from error
    if not text.isdigit() or len(text) >= _MOST_DIGITS:
        raise ImageError(f"{member} is not the index of a class", hint)
    return int(text)


def _class_of(member: TarMember, several: bool) -> str | None:
    """The folder or the inner archive that a member is in, or the archive where there are `several`."""
    parent = PurePosixPath(member.name).parent.name
    if parent:
        return parent.removesuffix(".tar")
    return member.archive.stem if several else None


def _with_ground_truth(found: tuple[ImageSource, ...], path: Path) -> LabelledImages:
    rows = _read_rows(path)
    images = [image for image in found if not isinstance(image, Unreadable)]
    if all(len(row) == 1 for row in rows):
        # One class per line, in the order of the images' names.
        images.sort(key=_base_name)
        if len(rows) != len(images):
            raise ImageError(
                f"{path} has {len(rows)} lines, but there are {len(images)} images",
                "one class per line, or `NAME CLASS`",
            )
        named = [row[0] for row in rows]
        named = _translate_ids(named, path)
    else:
        known = {_stem(row[0]): row[1] for row in rows if len(row) > 1}
        missing = next((image for image in images if _stem(_base_name(image)) not in known), None)
        if missing is not None:
            raise ImageError(f"{missing} is not in {path}", "give the ground truth of these images")
        named = [known[_stem(_base_name(image))] for image in images]
    unreadable = tuple(image for image in found if isinstance(image, Unreadable))
    # What is longer is a name, whatever it is made of.
    if all(name.isdecimal() and len(name) < _MOST_DIGITS for name in named):
        return LabelledImages(tuple(images), tuple(map(int, named)), None, unreadable)
    classes = tuple(sorted(set(named)))
    number = {name: label for label, name in enumerate(classes)}
    return LabelledImages(tuple(images), tuple(number[name] for name in named), classes, unreadable)


def _read_rows(path: Path) -> list[list[str]]:
    """The fields of each line, split at commas, tabs or spaces; without a header and empty lines."""
    try:
        text = read_file(path, f"the ground truth {path}", "a text file", _MOST_BYTES).decode("utf-8-sig")
        rows = [row for line in text.splitlines() if (row := next(csv.reader([line]), [])) and not line.startswith("#")]
    except (OSError, UnicodeDecodeError, csv.Error, DeployError) as error:
        raise ImageError(f"{path} cannot be read as a ground truth ({error})", "a text file") from error
    # Kaggle's: `ImageId,PredictionString`, and boxes after the class.
    rows = [[field for part in row for field in part.split()] for row in rows]
    rows = [row for row in rows if row and row[0] != "ImageId"]
    if not rows:
        raise ImageError(f"{path} is empty", "one class per line, or `NAME CLASS`")
    return rows


def _translate_ids(named: list[str], path: Path) -> list[str]:
    """Wnids instead of ILSVRC2012's own numbers from 1, which are in another order than the sorted classes."""
    if not all(name.isdecimal() for name in named) or "0" in named:
        return named
    known = _read_map(path.with_name(_MAP))
    if not known:
        raise ImageError(
            f"{path} numbers its classes from 1, as ILSVRC2012's development kit, whose order is not the sorted one",
            f"put {_MAP} of a development kit beside it, or give wnids in place of numbers",
        )
    unknown = next((name for name in named if name not in known), None)
    if unknown is not None:
        raise ImageError(f"class {unknown} of {path} is not in {_MAP}", "give the files of one development kit")
    return [known[name] for name in named]


def _read_map(path: Path) -> Mapping[str, str]:
    if not path.is_file():
        return {}
    return {row[1]: row[0] for row in _read_rows(path) if len(row) > 1}


def _base_name(image: ImageSource) -> str:
    return PurePosixPath(str(image)).name


def _stem(name: str) -> str:
    return PurePosixPath(name).stem if Path(name).suffix.lower() in SUFFIXES else PurePosixPath(name).name
