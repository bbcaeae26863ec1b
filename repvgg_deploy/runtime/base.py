"""Backends that run a model, behind one protocol."""

from __future__ import annotations

from typing import Protocol

from repvgg_deploy.artifacts import Array


class Runner(Protocol):
    """Runs one model on batches; names the backend, its version and the precision; never falls back silently."""

    @property
    def backend(self) -> str:
        """What runs the model, for example `onnxruntime-cpu`."""

    @property
    def backend_version(self) -> str:
        """The version of that library."""

    @property
    def precision(self) -> str:
        """fp32, fp16, int8."""

    @property
    def batch(self) -> int | None:
        """The one batch that the model takes, or None for any."""

    def run(self, images: Array) -> dict[str, Array]:
        """The outputs by name for a batch of inputs as the model wants them."""
