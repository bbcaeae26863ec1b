"""What an export begins ahead: it needs no torch, and keeps nothing."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from repvgg_deploy.checkpoints import CheckpointOptions, load_checkpoint
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.workflows.head_start import start_ahead


def test_the_checkpoint_is_the_one_that_is_read_otherwise_and_belongs_to_its_taker(checkpoint_file: Path) -> None:
    expected = load_checkpoint(checkpoint_file)
    with start_ahead(checkpoint_file, CheckpointOptions()) as started:
        found = started.take_checkpoint()
        assert (found.sha256, found.spec, found.notes) == (expected.sha256, expected.spec, expected.notes)
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
        kept = weakref.ref(found)
        del found
        assert kept() is None


def test_the_checkpoints_errors_come_when_it_is_taken(tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"PK\3\4 and nothing else")
    damaged = start_ahead(tmp_path / "net.pth", CheckpointOptions())
    with damaged as started, pytest.raises(CheckpointError, match="truncated or damaged"):
        started.take_checkpoint()
    with start_ahead(tmp_path / "absent.pth", CheckpointOptions()):
        pass


def test_it_begins_without_torch(checkpoint_file: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from repvgg_deploy.checkpoints import CheckpointOptions; "
        "from repvgg_deploy.workflows.head_start import start_ahead\n"
        f"with start_ahead(Path({str(checkpoint_file)!r}), CheckpointOptions()) as started: started.take_checkpoint()\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
