"""Files that appear when all of them are whole: written beside their place, fsynced, then renamed one by one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from repvgg_deploy.errors import DeployError

_PREFIX = ".repvgg-deploy-"
_ABANDONED_S = 24 * 3600
"""No export takes as long as this without writing a file."""


@contextmanager
def stage_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files replace those of `folder` when the block ends; after an error, none does.

    The temporary folder lies inside `folder`, so that the renames stay on one file system. A process that was killed
    leaves it there; the first call a day later removes it.

    Raises:
        DeployError: `folder` cannot be made or written to, or the disk is full.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        staging = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    except OSError as error:
        _take_back(made)
        raise DeployError(f"cannot write to {folder}: {error.strerror}", "choose another place with -o") from error
    finished = False
    try:
        yield staging
        _publish(staging, folder)
        finished = True
    except OSError as error:
        if error.strerror is None:
            raise
        raise DeployError(
            f"cannot write to {folder}: {error.strerror}", "free some space or choose another -o"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not finished:
            _take_back(made)


def _remove_abandoned(folder: Path) -> None:
    for left in folder.glob(f"{_PREFIX}*"):
        # Another process may be removing it as well.
        with suppress(OSError):
            written = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if left.is_dir() and time.time() - written > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)


def _take_back(made: list[Path]) -> None:
    """Remove the folders that this call made, innermost first, as far as they are empty still."""
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _publish(staging: Path, folder: Path) -> None:
    flush_files(staging)
    names = sorted(path.name for path in staging.iterdir())
    blocked = next((name for name in names if (folder / name).is_dir()), None)
    if blocked is not None:
        raise DeployError(f"{folder / blocked} is a directory, so no file can take its place", "choose another -o")
    for name in names:
        (staging / name).replace(folder / name)


def flush_files(folder: Path) -> None:
    """Wait until all files of `folder` are on the disk; quick where they are already."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; other threads run meanwhile."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def data_folder(name: str) -> Path:
    """The folder `models` or `calibration`, as installed from a wheel or as found in the repository."""
    package = Path(__file__).resolve().parent
    packed = package / "_data" / name
    return packed if packed.is_dir() else package.parent / name
