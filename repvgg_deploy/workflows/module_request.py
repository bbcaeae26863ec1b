"""The result that `export_module` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg_deploy.artifacts import Parity, Precision

if TYPE_CHECKING:
    from repvgg_deploy.engine import Engine


@dataclass(frozen=True)
class ChainSummary:
    """A quantized chain: its convolutions by the name of their weights, and the ratio of its output to its error.

    `output_db` is in dB, on the calibration examples.
    """

    layers: tuple[str, ...]
    output_db: float


@dataclass(frozen=True)
class ModuleExportResult:
    """What `export_module` wrote, and how every output compares with that of the stage before.

    Attributes:
        onnx: the graph.
        engine: what was built from it, or None.
        module: the class of the module.
        precision: of the graph's convolutions; in INT8 of those in `chains`.
        blocks: names of the blocks that were fused.
        inputs, outputs: their names.
        parameters: of the fused module.
        sha256: of its weights, names and values.
        ops: how many nodes of each operator the graph has.
        parity: by stage and output: `fused` (against the module as it was), `quantized` (INT8 against fused, in float
            arithmetic), `onnx` (the graph in ONNX Runtime against the stage before), `engine` (where a GPU could run
            it).
        chains: what is INT8.
        seconds: the whole took.

    Example:
        >>> from repvgg_deploy import build, export_module, load_checkpoint
        >>> result = export_module(build(load_checkpoint("net.pth")), torch.rand(1, 3, 64, 64), "whole.onnx")
        >>> result.blocks[0], result.outputs
        ('stages.0.0', ('output',))
    """

    onnx: Path
    engine: Engine | None
    module: str
    precision: Precision
    blocks: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: int
    sha256: str
    ops: Mapping[str, int]
    parity: Mapping[str, Mapping[str, Parity]]
    chains: tuple[ChainSummary, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The object that `export --module --json` prints."""
        return {
            "onnx": str(self.onnx),
            "engine": None if self.engine is None else str(self.onnx.parent / self.engine.plan.name),
            "module": self.module,
            "precision": str(self.precision),
            "blocks": list(self.blocks),
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "parameters": self.parameters,
            "sha256": self.sha256,
            "ops": dict(self.ops),
            "parity": {
                stage: {name: parity.to_dict() for name, parity in outputs.items()}
                for stage, outputs in self.parity.items()
            },
            "chains": [{"layers": list(chain.layers), "output_db": round(chain.output_db, 2)} for chain in self.chains],
            "seconds": round(self.seconds, 3),
        }
