"""The table of published checkpoints, `models/published/*.toml`: where each is, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.files.typed_values import Line, convert, parse_toml, read_file

_HINT = "models/published has the tables of this release"

# A file in the cache, and nowhere else.
_FileName = Annotated[str, Meta(max_length=200, pattern=r"\A[A-Za-z0-9_][A-Za-z0-9._-]*\Z")]
_Url = Annotated[str, Meta(max_length=2000, pattern=r"\Ahttps?://[!-~]+\Z")]
_Pixels = Annotated[int, Meta(ge=1, le=1 << 16)]


@dataclass(frozen=True)
class PublishedFile:
    """One published checkpoint.

    Attributes:
        source: who publishes it: `openmmlab`, `holocron` or `timm`.
        arch: the architecture, as `A0`.
        url: its address.
        classes: of its classifier.
        input_size: of its images, in pixels.
        resize: of their shorter side before the crop; None for what the card of the architecture says.
        sha256: of the file, in full or its first digits; empty if it is not published.
        bytes: the size; 0 if it is not published.
        file_name: what the file is called here.
    """

    source: str
    arch: str
    url: str
    classes: int
    input_size: int
    resize: int | None
    sha256: str
    bytes: int
    file_name: str

    @property
    def name(self) -> str:
        """As `pull` takes it: `openmmlab/B2`."""
        return f"{self.source}/{self.arch}"


@dataclass(frozen=True)
class _Row:
    arch: _FileName
    url: _Url
    input_size: _Pixels
    resize: _Pixels | None = None
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{0,64}\Z")] = ""
    bytes: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    name: _FileName | None = None


@dataclass(frozen=True)
class _Table:
    source: Line
    classes: Annotated[int, Meta(ge=1, le=1 << 24)]
    file: tuple[_Row, ...]


def load_published(folder: Path | None = None) -> tuple[PublishedFile, ...]:
    """Every published checkpoint that is known, source by source.

    Raises:
        DeployError: a table of `folder` is damaged.
    """
    found = []
    for path in sorted((folder or data_folder("models") / "published").glob("*.toml")):
        values = parse_toml(read_file(path, str(path), _HINT), str(path), _HINT)
        table = convert(values, _Table, str(path), _HINT)
        for row in table.file:
            last = PurePosixPath(urlsplit(row.url).path).name
            name = row.name or convert(last, _FileName, f"{path}: the name in {row.url}", _HINT)
            found.append(
                PublishedFile(
                    source=path.stem,
                    arch=row.arch,
                    url=row.url,
                    classes=table.classes,
                    input_size=row.input_size,
                    resize=row.resize,
                    sha256=row.sha256,
                    bytes=row.bytes,
                    file_name=name,
                )
            )
    return tuple(found)


def find_published(name: str, folder: Path | None = None) -> PublishedFile:
    """The checkpoint of that name: `openmmlab/B2`, in any case, or `B2` where only one source has it.

    Raises:
        DeployError: there is none, or several sources have it.
    """
    files = load_published(folder)
    wanted = name.strip().lower().replace("repvgg-", "")
    found = [file for file in files if wanted in (file.name.lower(), file.arch.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        raise DeployError(f"several sources publish {name}", f"one of: {', '.join(file.name for file in found)}")
    source, _, _ = wanted.rpartition("/")
    known = [file.name for file in files if file.source == source] or [file.name for file in files]
    raise DeployError(f"no published checkpoint {name} is known", f"one of: {', '.join(known)}")
