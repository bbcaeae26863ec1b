"""The results that `export` and `export_module` return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg_deploy.artifacts import Parity, Precision, Preprocessing
from repvgg_deploy.checkpoints import Checkpoint
from repvgg_deploy.graphs.layers import Fp16Rounding
from repvgg_deploy.workflows.choices import Choices

if TYPE_CHECKING:
    from repvgg_deploy.engine import Engine
    from repvgg_deploy.quantization.net import QuantizationSummary


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote: what `export` of a checkpoint and `export_module` of a whole network have in common.

    Attributes:
        onnx: the graph.
        engine: what was built from it, or None.
        precision: of the graph's convolutions.
        parameters: of the fused net.
        sha256: of the checkpoint's tensors, or of the module's.
        ops: how many nodes of each operator the graph has.
        seconds: the whole took.

    Example:
        >>> from repvgg_deploy import ExportRequest, ExportResult, export
        >>> result = export(ExportRequest(Path("net.pth"), Path("out")))
        >>> isinstance(result, ExportResult), "BatchNormalization" in result.ops
        (True, False)
    """

    onnx: Path
    engine: Engine | None
    precision: Precision
    parameters: int
    sha256: str
    ops: Mapping[str, int]
    seconds: float

    @property
    def plan(self) -> Path | None:
        """The engine's file, which lies beside the graph; None if none was built."""
        return None if self.engine is None else self.onnx.parent / self.engine.plan.name


@dataclass(frozen=True, kw_only=True)
class CheckpointExportResult(ExportResult):
    """What `export` wrote, and how each stage compares with the one before.

    `choices` are the settings that no tensor tells, see `describe_choices`.

    `parity` has `fused` (against the training form in float64), `quantized` (INT8 simulated, against fused), `onnx`
    (the graph in ONNX Runtime, against the stage before) and `engine` (where a GPU could run it).

    Example:
        >>> from repvgg_deploy import ExportRequest, export
        >>> result = export(ExportRequest(Path("net.pth"), Path("out")))
        >>> result.parity["onnx"].relative < 1e-4
        True
    """

    checkpoint: Checkpoint
    preprocessing: Preprocessing
    parity: dict[str, Parity]
    rounding: Fp16Rounding | None
    quantization: QuantizationSummary | None
    choices: Choices
    peak_bytes: int

    @property
    def arch(self) -> str:
        """The architecture's name."""
        return self.checkpoint.arch

    def to_dict(self) -> dict[str, Any]:
        """The object that `export --json` prints."""
        result: dict[str, Any] = {
            "onnx": str(self.onnx),
            "engine": None if self.plan is None else str(self.plan),
            "arch": self.checkpoint.arch,
            "layout": self.checkpoint.layout,
            "form": self.checkpoint.form,
            "precision": str(self.precision),
            "parameters": self.parameters,
            "sha256": self.sha256,
            "assumed": self.choices,
            "ops": dict(self.ops),
            "parity": {stage: parity.to_dict() for stage, parity in self.parity.items()},
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
        }
        if self.rounding is not None:
            result["fp16"] = {
                "values": self.rounding.values,
                "subnormal": self.rounding.subnormal,
                "flushed_to_zero": self.rounding.flushed_to_zero,
            }
        if self.quantization is not None:
            result["quantization"] = summary_to_dict(self.quantization)
        return result


@dataclass(frozen=True)
class ChainSummary:
    """A quantized chain: its convolutions by the name of their weights, and the ratio of its output to its error.

    `output_db` is in dB, on the calibration examples.
    """

    layers: tuple[str, ...]
    output_db: float


@dataclass(frozen=True, kw_only=True)
class ModuleExportResult(ExportResult):
    """What `export_module` wrote, and how every output compares with that of the stage before.

    Attributes:
        module: the class of the module.
        blocks: names of the blocks that were fused.
        inputs, outputs: their names.
        parity: by stage and output: `fused` (against the module as it was), `quantized` (INT8 against fused, in float
            arithmetic), `onnx` (the graph in ONNX Runtime against the stage before), `engine` (where a GPU could run
            it).
        chains: what is INT8.

    Example:
        >>> from repvgg_deploy import build, export_module, load_checkpoint
        >>> result = export_module(build(load_checkpoint("net.pth")), torch.rand(1, 3, 64, 64), "whole.onnx")
        >>> result.blocks[0], result.outputs
        ('stages.0.0', ('output',))
    """

    module: str
    blocks: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parity: Mapping[str, Mapping[str, Parity]]
    chains: tuple[ChainSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """The object that `export --module --json` prints."""
        return {
            "onnx": str(self.onnx),
            "engine": None if self.plan is None else str(self.plan),
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


def summary_to_dict(summary: QuantizationSummary) -> dict[str, Any]:
    """A quantization as JSON; infinite ratios, of layers without an error, become null."""
    layers = [
        {key: None if value in (float("inf"), -float("inf")) else value for key, value in row.to_dict().items()}
        for row in summary.layers
    ]
    return {
        "recipe": summary.recipe,
        "images": summary.images,
        "images_sha256": summary.images_sha256,
        "calibrated_on": summary.calibrated_on,
        **({} if summary.pictures is None else {"pictures": summary.pictures.to_dict()}),
        "seed": summary.seed,
        "full_range": summary.full_range,
        "kept_float": [row.name for row in summary.layers if row.kept_float],
        "warnings": list(summary.warnings),
        "layers": layers,
    }
