"""Which images there are: in folders, globs, lists and tar archives, in an order that depends on their names only."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from repvgg_deploy.errors import DeployError, ImageError
from repvgg_deploy.files.typed_values import read_file
from repvgg_deploy.images.archives import TarMember, index_archive

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
"""What is decoded, by Pillow's names; other formats run little-reviewed decoders, or other programs."""

SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif",
    # Not decoded, but images nevertheless: they are reported, not skipped silently.
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jxl", ".heic", ".heif", ".avif", ".tga", ".psd", ".eps", ".ico",
})  # fmt: skip
ARCHIVES = frozenset({".tar"})
# A path per line, of millions of images.
_MOST_BYTES = 1 << 30
# The largest sets have 22,000 classes, and as many folders of annotations.
_MOST_BARREN = 50_000

_KNOWN = "JPEG, PNG, WebP, TIFF, BMP or GIF files, a folder or a tar archive of them, or a list of their paths"


@dataclass(frozen=True)
class Unreadable:
    """A folder, an archive or a list entry whose images cannot be found, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return str(self.path)


ImageSource = Path | TarMember | Unreadable
"""Where the bytes of an image are; `str` of it is the image's name."""


def read_source(source: ImageSource, max_bytes: int) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: it cannot be read, is not a regular file, or is larger than `max_bytes`.
    """
    if isinstance(source, Unreadable):
        raise ImageError(f"{source} cannot be read ({source.reason})")
    try:
        if isinstance(source, TarMember):
            size = source.size
        else:
            found = source.stat()
            size = found.st_size
            if not stat.S_ISREG(found.st_mode):
                # Reading a pipe or a device may never end.
                raise ImageError(f"{source} is damaged (not a regular file)")
        if size > max_bytes:
            raise ImageError(f"{source} is too large ({size:,} bytes; at most {max_bytes:,} are read)")
        data = source.read() if isinstance(source, TarMember) else source.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"there is no image {source}") from error
    except (OSError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"{source} cannot be read ({reason})") from error
    if isinstance(source, TarMember) and len(data) < source.size:
        raise ImageError(f"{source} is damaged (the archive ends in the middle of it)")
    return data


def list_images(source: Path) -> tuple[ImageSource, ...]:
    """The images of one folder, archive, list, glob or file; see `find_images`.

    Raises:
        ImageError: there is no such folder or list, or no image in it.
    """
    return find_images([source])


def find_images(sources: Iterable[Path | str]) -> tuple[ImageSource, ...]:
    """All images of `sources` in their order, each name once.

    A folder gives all images below it, sorted, and those of the tar archives in it. An archive gives its members in
    its own order. A text file lists one path per line, relative to itself; empty lines and lines that begin with # do
    not count. A pattern with `*`, `?`, `[…]` or `**` gives what it matches, sorted. What cannot be entered or read is
    in the result as `Unreadable`: nothing is skipped silently.

    Raises:
        ImageError: there is no such folder or list, or no image in it.
    """
    found: dict[str, ImageSource] = {}
    for source in sources:
        before = len(found)
        empty = True
        for image in _expand(Path(source)):
            empty = False
            found.setdefault(str(image), image)
        if empty and len(found) == before:
            raise ImageError(f"there is no image in {source}", f"give {_KNOWN}")
    return tuple(found.values())


def _expand(source: Path) -> Iterator[ImageSource]:
    if "\0" in str(source):
        raise ImageError("a path has a NUL character, which no file's name has", f"give {_KNOWN}")
    try:
        is_folder = source.is_dir()
    except OSError as error:
        raise ImageError(f"{source} cannot be read ({error.strerror})", f"give {_KNOWN}") from error
    if is_folder:
        yield from walk_folder(source)
    elif source.suffix.lower() in ARCHIVES and source.exists():
        yield from list_archive(source)
    elif source.is_file() and source.suffix.lower() not in SUFFIXES:
        yield from _read_list(source)
    elif source.exists():
        yield source
    elif glob.has_magic(str(source)):
        for match in _match(source):
            if isinstance(match, Unreadable):
                yield match
            elif match.suffix.lower() in SUFFIXES | ARCHIVES and not match.is_dir():
                yield from _expand(match)
    else:
        raise ImageError(f"there is no folder {source}, nor an image or a list of that name", f"give {_KNOWN}")


@dataclass
class Tally:
    """How many folders a walk has seen, with and without images of their own."""

    fruitful: int = 0
    barren: int = 0

    def add(self, is_fruitful: bool, start: Path) -> None:
        """Count a folder below `start`; raise ImageError once nearly all of very many are without images."""
        self.fruitful += is_fruitful
        self.barren += not is_fruitful
        if self.barren > max(_MOST_BARREN, 3 * self.fruitful):
            raise ImageError(
                f"{start} has more than {_MOST_BARREN:,} folders without an image below it",
                "give the folder of the images",
            )


def walk_folder(folder: Path, tally: Tally | None = None) -> Iterator[ImageSource]:
    """All images below a folder and in archives below it, sorted; links are followed, each folder once.

    A link that leads to a folder around the one given is not followed, as it leads to everything. A folder that cannot
    be entered is `Unreadable`. `tally` is that of several walks that belong together.

    Raises:
        ImageError: it is no folder of images, but a whole system of other files.
    """
    for entry in _sorted(_list_files(folder, tally or Tally())):
        if isinstance(entry, Path) and entry.suffix.lower() in ARCHIVES:
            yield from list_archive(entry)
        else:
            yield entry


def _list_files(folder: Path, tally: Tally) -> list[Path | Unreadable]:
    """The images and archives below a folder, and the folders that cannot be entered."""
    problems: list[Unreadable] = []

    def note(error: OSError) -> None:
        problems.append(Unreadable(Path(error.filename), error.strerror or type(error).__name__))

    paths: list[Path] = []
    seen = {_identity(around) for around in folder.resolve().parents}
    for place, folders, files in os.walk(folder, onerror=note, followlinks=True):
        identity = _identity(Path(place))
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders.sort()
        found = [Path(place) / name for name in files if Path(name).suffix.lower() in SUFFIXES | ARCHIVES]
        tally.add(bool(found), folder)
        paths += found
    return [*paths, *problems]


def _sorted(entries: Iterable[Path | Unreadable]) -> list[Path | Unreadable]:
    return sorted(entries, key=lambda entry: entry if isinstance(entry, Path) else entry.path)


def _match(pattern: Path) -> list[Path | Unreadable]:
    """What a pattern matches, sorted; `**` stands for any folders, as `walk_folder` enters them: each once."""
    parts = pattern.parts
    if "**" not in parts:
        return _sorted(map(Path, glob.glob(str(pattern))))  # noqa: PTH207 (a pattern may be absolute)
    first = parts.index("**")
    start, rest = Path(*parts[:first]), parts[first:]
    found: list[Path | Unreadable] = []
    for base in map(Path, glob.glob(str(start))):  # noqa: PTH207
        found += [
            entry
            for entry in (_list_files(base, Tally()) if base.is_dir() else [])
            if isinstance(entry, Unreadable) or _fits(entry.relative_to(base).parts, rest)
        ]
    return _sorted(found)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the words of a path fit those of a pattern; a hidden name fits only a word that begins with a dot too."""
    if not parts or not pattern:
        return not parts and all(word == "**" for word in pattern)
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or (not parts[0].startswith(".") and _fits(parts[1:], pattern))
    is_shown = pattern[0].startswith(".") or not parts[0].startswith(".")
    return is_shown and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def list_archive(path: Path) -> Iterator[ImageSource]:
    """The images of a tar archive in its own order; an archive that ends early or is damaged is `Unreadable` as well.

    An archive that cannot be read at all is nothing but `Unreadable`.
    """
    index = index_archive(path)
    yield from (member for member in index.members if Path(member.name).suffix.lower() in SUFFIXES)
    if index.problem is not None:
        yield Unreadable(path, index.problem)


def _read_list(source: Path) -> Iterator[ImageSource]:
    try:
        text = read_file(source, f"the list {source}", "a text file, one path per line", _MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError, DeployError) as error:
        raise ImageError(f"{source} is not a list of images ({error})", "a text file, one path per line") from error
    yield from list_lines(text.splitlines(), source.parent)


def list_lines(lines: Iterable[str], folder: Path) -> Iterator[ImageSource]:
    """The images that `lines` name, relative to `folder`; an archive among them gives its members."""
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        path = folder / line
        if path.suffix.lower() in ARCHIVES:
            yield from list_archive(path)
        else:
            yield path
