"""`pull`: a published checkpoint by name, checked, in the cache or where it is wanted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repvgg_deploy.checkpoints.downloads import LocalFile, fetch_published
from repvgg_deploy.checkpoints.published import PublishedFile, find_published
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.progress import SILENT, Progress


@dataclass(frozen=True)
class PullResult:
    """A published checkpoint on this machine; `path` is the copy that was asked for, or the one in the cache."""

    file: PublishedFile
    local: LocalFile
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """The object that `pull --json` prints."""
        return {
            "name": self.file.name,
            "arch": self.file.arch,
            "source": self.file.source,
            "url": self.file.url,
            "classes": self.file.classes,
            "input_size": self.file.input_size,
            "file": str(self.path),
            "bytes": self.path.stat().st_size,
            "sha256": self.local.sha256,
            "checked": self.local.check,
            "cached": self.local.was_cached,
        }


def pull(name: str, output: Path | None = None, offline: bool = False, progress: Progress = SILENT) -> PullResult:
    """Fetch the published checkpoint `name`, as `openmmlab/B2`, and copy it to `output` if that is given.

    Args:
        name: see `find_published`.
        output: a folder, or the file to write.
        offline: ask no server.
        progress: receives notes and the step `downloading`.

    Raises:
        DeployError: there is no such checkpoint, or it cannot be fetched, or it is not what its checksum says.
    """
    file = find_published(name)
    local = fetch_published(file, progress, offline)
    if local.check == "none":
        progress.note(
            f"warning: no sha256 of {file.name} is published; that of this first download is recorded: {local.sha256}"
        )
    if output is None:
        return PullResult(file, local, local.path)
    target = output / file.file_name if output.is_dir() or not output.suffix else output
    with stage_files(target.absolute().parent) as staging:
        shutil.copyfile(local.path, staging / target.name)
    return PullResult(file, local, target)
