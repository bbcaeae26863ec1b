"""A file that is written to while it is read, and what is not a file."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.checkpoints.sources import FileSource, open_source
from repvgg_deploy.errors import CheckpointError


def rewrite(path: Path, content: bytes) -> None:
    """Write over a file in place, as a trainer does with its last checkpoint."""
    path.write_bytes(content)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10_000_000))


@pytest.mark.parametrize("content", ["the same", "cut", "another"])
@pytest.mark.parametrize("moment", ["hash", "fill"])
def test_file_that_is_written_to_while_it_is_read_is_an_error(
    content: str, moment: str, checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = checkpoint_file.read_bytes()
    after = {"the same": whole, "cut": whole[:1000], "another": whole[::-1]}[content]
    original = getattr(FileSource, moment)
    # Hashing and reading are two threads.
    calls = itertools.count(1)

    def meanwhile(self: FileSource, *arguments: object) -> object:
        if next(calls) == (1 if moment == "hash" else 200):
            rewrite(checkpoint_file, after)
        return original(self, *arguments)

    monkeypatch.setattr(FileSource, moment, meanwhile)
    with pytest.raises(CheckpointError, match="was written to while it was read"):
        load_checkpoint(checkpoint_file)


def test_file_that_is_replaced_while_it_is_read_is_read_to_its_end(checkpoint_file: Path, tmp_path: Path) -> None:
    expected = load_checkpoint(checkpoint_file).sha256
    with open_source(checkpoint_file) as source:
        other = tmp_path / "new.pth"
        other.write_bytes(b"new")
        other.replace(checkpoint_file)
        assert source.hash() == expected


@pytest.mark.slow
def test_no_crash_of_a_process_whose_file_is_cut(checkpoint_file: Path) -> None:
    # A mapped file would end the process with SIGBUS.
    program = (
        "import sys, pathlib; from repvgg_deploy.checkpoints import load_checkpoint; "
        "p = pathlib.Path(sys.argv[1]); c = load_checkpoint(p); p.write_bytes(b''); "
        "print(sum(float(t.sum()) for t in c.tensors.values()))"
    )
    done = subprocess.run([sys.executable, "-c", program, checkpoint_file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "pipe.pth"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        load_checkpoint(path)


def test_device_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        load_checkpoint("/dev/zero")
