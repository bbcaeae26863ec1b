"""What of an export begins ahead: onnxsim loads, and the checkpoint is read.

Neither needs torch, whose import keeps one core busy for a second; a second core does both meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from repvgg_deploy.checkpoints import Checkpoint, CheckpointOptions
from repvgg_deploy.graphs.simplification import SimplificationCheck
from repvgg_deploy.threads import start_workers


@dataclass(frozen=True)
class HeadStart:
    """A check that is loading in a process of its own, and a checkpoint that is being read in a thread."""

    simplification: SimplificationCheck
    _reading: list[Future[Checkpoint]]

    def take_checkpoint(self) -> Checkpoint:
        """The checkpoint once it is read; for one call, since its memory is the caller's alone.

        Raises:
            DeployError: it cannot be read.
        """
        return self._reading.pop().result()


@contextmanager
def start_ahead(checkpoint: Path, source: CheckpointOptions) -> Iterator[HeadStart]:
    """Begin both; leaving the block ends the process, and waits until nothing is read any more.

    The checkpoint's errors are raised where it is taken.
    """
    with SimplificationCheck() as simplification, start_workers(1) as pool:
        yield HeadStart(simplification, [pool.submit(source.load, checkpoint)])
