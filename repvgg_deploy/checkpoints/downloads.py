"""Published files in the user's cache: downloaded once, continued where they stopped, and checked every time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from repvgg_deploy.checkpoints.published import PublishedFile
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.files.places import cache_folder
from repvgg_deploy.progress import SILENT, Progress

Check = Literal["sha256", "first digits of sha256", "recorded sha256", "none"]
# What has arrived of a block is lost when the connection breaks.
_BLOCK = 1 << 16
# Seconds to connect, and between two blocks.
_TIMEOUT = (10, 60)
_ATTEMPTS = 3
# Of a file whose size is not published; the largest checkpoints have half a gigabyte.
_MOST_BYTES = 4 << 30
_CHANGED = "try again; if it stays so, the publisher has changed the file, or somebody between has"


@dataclass(frozen=True)
class LocalFile:
    """A published file on this machine.

    Attributes:
        path: where it is.
        sha256: of what is there.
        check: what it was held to; `none` at the first download of a file whose sha256 is not published.
        was_cached: whether it was here already.
    """

    path: Path
    sha256: str
    check: Check
    was_cached: bool


def published_folder() -> Path:
    """Where published files are kept: in the user's cache, `XDG_CACHE_HOME` where that is set."""
    return cache_folder() / "published"


def fetch_published(file: PublishedFile, progress: Progress = SILENT, offline: bool = False) -> LocalFile:
    """The file on this machine, downloaded if it is not in the cache, and equal to what its checksum says.

    A download that stopped goes on where it was. A sha256 that is not published is recorded at the first download, and
    the file is held to it from then on. Nothing that does not match is kept.

    Args:
        file: which one.
        progress: receives notes, and the step `downloading`, in MB.
        offline: ask no server; a file that is not in the cache is an error.

    Raises:
        DeployError: the server cannot be reached or does not have the file, the disk is full, or a checksum differs.
    """
    folder = published_folder() / file.source
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{file.file_name}.lock"):
            return _fetch(file, folder / file.file_name, progress, offline)
    except OSError as error:
        raise DeployError(
            f"cannot keep {file.file_name} in {folder}: {error.strerror or error}",
            "free some space, or set XDG_CACHE_HOME to another folder",
        ) from error


def _fetch(file: PublishedFile, path: Path, progress: Progress, offline: bool) -> LocalFile:
    record = path.with_name(f"{path.name}.sha256")
    expected, check = _expect(file, record)
    if path.exists():
        found = hash_file(path)
        if found.startswith(expected):
            return LocalFile(path, _record(found, path, record), check, was_cached=True)
        progress.note(f"warning: {path} has changed since it was downloaded; it is downloaded again")
    if offline:
        raise DeployError(
            f"{file.name} is not in the cache, and --offline asks no server", f"put the file of {file.url} at {path}"
        )
    progress.note(f"downloading {file.url}")
    _download(file, path, expected, progress)
    return LocalFile(path, _record(hash_file(path), path, record), check, was_cached=False)


def _expect(file: PublishedFile, record: Path) -> tuple[str, Check]:
    """The beginning of the sha256 that the file must have, and what says so."""
    if file.sha256:
        return file.sha256, "sha256" if len(file.sha256) == 64 else "first digits of sha256"
    with suppress(FileNotFoundError, UnicodeDecodeError):
        recorded = re.match(r"[0-9a-f]{64}\b", record.read_text(encoding="utf-8"))
        if recorded is not None:
            return recorded[0], "recorded sha256"
    return "", "none"


def _record(sha256: str, path: Path, record: Path) -> str:
    """Keep the sha256 beside the file, in the form of `sha256sum`."""
    line = f"{sha256}  {path.name}\n"
    if not record.exists() or record.read_text(encoding="utf-8", errors="replace") != line:
        record.write_text(line, encoding="utf-8")
    return sha256


def _download(file: PublishedFile, path: Path, expected: str, progress: Progress) -> None:
    try:
        import pooch
        import requests
    except ImportError as error:
        raise DeployError(
            "downloads need the package pooch, which is not installed",
            f"pip install 'repvgg-deploy[pull]', or put the file of {file.url} at {path}",
        ) from error
    pooch.get_logger().setLevel(logging.WARNING)
    path.unlink(missing_ok=True)
    downloader = _Resuming(file, path, expected, progress)
    try:
        # pooch moves the file to its place once the downloader has returned; it knows whole checksums only.
        pooch.retrieve(file.url, None, fname=path.name, path=path.parent, downloader=downloader)
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise DeployError(
            f"the server answers {status} for {file.url}", f"fetch it by other means, and put it at {path}"
        ) from error
    except requests.RequestException as error:
        kept = downloader.part.stat().st_size if downloader.part.exists() else 0
        raise DeployError(
            f"cannot download {file.url}: {_name_reason(error)}",
            f"run it again: it continues after {kept / 1e6:.1f} MB"
            if kept
            else f"check the network, or put the file at {path}",
        ) from error


def _name_reason(error: Exception) -> str:
    """The last exception of a chain, which says what happened to the connection."""
    reason: BaseException = error
    while (inner := reason.__cause__ or reason.__context__) is not None:
        reason = inner
    return str(reason) or type(reason).__name__


class _Resuming:
    """A downloader for pooch that keeps what has arrived in `NAME.part`, and asks for the rest only.

    The server's validator (ETag, or the date) lies beside it: only the rest of the same file is appended.
    """

    def __init__(self, file: PublishedFile, path: Path, expected: str, progress: Progress) -> None:
        self.file = file
        self.part = path.with_name(f"{path.name}.part")
        self.validator = path.with_name(f"{path.name}.part.validator")
        self._expected = expected
        self._progress = progress

    def __call__(self, url: str, output_file: str, _pooch: Any, check_only: bool = False) -> bool | None:
        """Download to `output_file`, a temporary file of pooch's."""
        import requests

        if check_only:
            return bool(requests.head(url, timeout=_TIMEOUT, allow_redirects=True).ok)
        for attempt in range(_ATTEMPTS):
            before = self._size()
            try:
                self._continue(url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                # As long as something arrives, the next attempt gets further.
                if attempt == _ATTEMPTS - 1 or self._size() == before:
                    raise
        self._require_checksum()
        self.part.replace(output_file)
        self._forget()
        return None

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _continue(self, url: str) -> None:
        import requests

        done = self._size()
        # Of a compressed answer neither lengths nor ranges would be those of the file.
        headers = {"Accept-Encoding": "identity"}
        validator = self.validator.read_text(encoding="ascii", errors="ignore") if self.validator.exists() else ""
        if done and validator:
            headers |= {"Range": f"bytes={done}-", "If-Range": validator}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                # All of it was here already, or more than there is; the checksum tells.
                return
            answer.raise_for_status()
            resumed = answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
            done = done if answer.status_code == requests.codes.partial_content and resumed else 0
            if done:
                self._progress.note(f"continuing after {done / 1e6:.1f} MB")
            tag = answer.headers.get("ETag", "")
            # A weak tag may stand for other bytes.
            strong = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")
            self.validator.write_text(strong, encoding="ascii", errors="ignore")
            length = answer.headers.get("Content-Length", "")
            total = done + (int(length) if length.isdecimal() and len(length) < 20 else 0)
            self._store(answer.iter_content(_BLOCK), done, total)

    def _store(self, blocks: Iterator[bytes], done: int, total: int) -> None:
        most = self.file.bytes or _MOST_BYTES
        with self.part.open("ab" if done else "wb") as output:
            for block in blocks:
                output.write(block)
                done += len(block)
                if done > most:
                    self._forget()
                    raise DeployError(
                        f"{self.file.url} gives more than the {most:,} bytes that {self.file.name} may have; "
                        "nothing was kept",
                        _CHANGED,
                    )
                self._progress.step("downloading, MB", done / 1e6, max(total, done) / 1e6)

    def _require_checksum(self) -> None:
        size = self._size()
        found, wanted = hash_file(self.part), self._expected
        if found.startswith(wanted) and self.file.bytes in (0, size):
            return
        self._forget()
        what = f"its sha256 is {found}, not {wanted}{'…' if len(wanted) < 64 else ''}"
        if found.startswith(wanted):
            what = f"it has {size:,} bytes, not {self.file.bytes:,}"
        raise DeployError(
            f"what {self.file.url} gives is not {self.file.name}: {what}; nothing was kept",
            _CHANGED,
        )

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.validator.unlink(missing_ok=True)
