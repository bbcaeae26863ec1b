"""The journal of a set of files that takes its places: which are moved, and what is there before and after."""

from __future__ import annotations

import json
import stat
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from repvgg_deploy.errors import DeployError

# A line per file.
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Move:
    """One file or folder that takes its place: `path` below the folder, `new` and `old` tell what is there after it.

    `old` is None where there was nothing.
    """

    path: str
    new: tuple[int, ...]
    old: tuple[int, ...] | None


def identify(path: Path) -> tuple[int, ...] | None:
    """What a rename leaves as it is and a writer does not; None if there is nothing at `path`."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_ino,) if stat.S_ISDIR(found.st_mode) else (found.st_ino, found.st_size, found.st_mtime_ns)


def encode_journal(moves: Sequence[Move]) -> str:
    """The text of a journal: a CRC-32 in hexadecimal, and what it is of, the moves as JSON."""
    text = json.dumps([asdict(move) for move in moves])
    return f"{_checksum(text)} {text}"


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def read_journal(path: Path, folder: Path) -> list[Move] | None:
    """The moves; None if the file is damaged, or is about other places than those in `folder`.

    Whoever made the folder, or packed it into an archive, may have made the journal as well.
    """
    import msgspec

    from repvgg_deploy.files.typed_values import read_file

    try:
        checksum, _, text = read_file(path, str(path), "", _MOST_BYTES).decode("ascii").partition(" ")
        if checksum != _checksum(text):
            return None
        # Not the typed reader's parser: a file's name that is not UTF-8 has lone surrogates.
        moves = msgspec.convert(json.loads(text), list[Move])
    except (OSError, DeployError, ValueError, RecursionError, msgspec.ValidationError):
        return None
    return moves if all(_is_inside(folder, move.path) for move in moves) else None


def _is_inside(folder: Path, path: str) -> bool:
    """Whether what `path` names lies below `folder`, and not where a link leads to."""
    parts = PurePosixPath(path).parts
    if not parts or "\0" in path or path.startswith("/") or ".." in parts:
        return False
    return not any(folder.joinpath(*parts[:count]).is_symlink() for count in range(1, len(parts)))
