"""Files that appear when all of them are whole: written beside their place, then published as one set."""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files import publishing
from repvgg_deploy.files.abort import renaming, undone_on_abort
from repvgg_deploy.files.work_folders import make_work_folder, remove_abandoned

_SCRATCH_PREFIX = "repvgg-deploy-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder of the system, removed at the end of the block or when a signal ends the process.

    What a process that was killed left there is removed first.

    Raises:
        DeployError: it cannot be made, or the disk is full.
    """
    begun: list[Path] = []
    with undone_on_abort(lambda: _remove_folders(begun)):
        try:
            parent = Path(tempfile.gettempdir())
            remove_abandoned(parent, _SCRATCH_PREFIX)
            work = make_work_folder(parent, _SCRATCH_PREFIX, begun.append)
            # Not the work folder itself, which is locked: files that are published in it would wait for that for ever.
            inside = work.path / "files"
            inside.mkdir()
        except OSError as error:
            raise DeployError(f"there is no place for temporary files: {error.strerror}", "set TMPDIR") from error
        try:
            yield inside
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DeployError(f"cannot write to {parent}: {error.strerror}", "free some space or set TMPDIR") from error
        finally:
            work.remove()


@contextmanager
def stage_files(folder: Path, is_result: bool = True, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A temporary folder whose files replace those of `folder` when the block ends; after an error, none does.

    They appear as one set, whatever fails and whenever the process ends; see `publishing`. A folder among them is moved
    as a whole to where there is none of its name, and else what is in it is moved. Where there is a set of a process
    that was killed in the middle, it is completed first.

    The temporary folder lies inside `folder`, so that the renames stay on one file system. A process that was killed
    leaves it there; the next call removes it.

    Args:
        folder: made if it does not exist.
        is_result: the files are what the process is run for; a cache, or one of several results, is not.
        check: called right before the first rename, while other processes wait with theirs; what it raises stops all.

    Raises:
        DeployError: `folder` cannot be made or written to, or the disk is full.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    begun: list[Path] = []

    def undo() -> None:
        _remove_folders(path for path in begun if not publishing.is_needed(path))
        _take_back(made)

    with undone_on_abort(undo) as forget:
        try:
            work, staging = publishing.begin(folder, begun.append)
        except OSError as error:
            _take_back(made)
            raise DeployError(f"cannot write to {folder}: {error.strerror}", "choose another place with -o") from error
        finished = False
        try:
            yield staging
            publishing.publish(work, folder, check, lambda: renaming(forget if is_result else None))
            finished = True
        except OSError as error:
            if error.strerror is None:
                raise
            raise DeployError(
                f"cannot write to {folder}: {error.strerror}", "free some space or choose another -o"
            ) from error
        finally:
            work.release() if publishing.is_needed(work.path) else work.remove()
            if not finished:
                _take_back(made)


def _remove_folders(folders: Iterable[Path]) -> None:
    """Remove folders that other threads may still be writing to; they get errors that nobody will read."""
    for folder in folders:
        # Under another name nothing is added to it; one that is written to faster than it is emptied would stay.
        aside = folder.with_name(f"{folder.name}-ended")
        with suppress(OSError):
            folder.rename(aside)
        for _ in range(100):
            for path in (aside, folder):
                shutil.rmtree(path, ignore_errors=True)
            if not aside.exists() and not folder.exists():
                break
            time.sleep(0.01)


def _take_back(made: list[Path]) -> None:
    """Remove the folders that this call made, innermost first, as far as they are empty still."""
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
