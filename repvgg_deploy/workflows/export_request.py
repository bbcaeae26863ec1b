"""The request that `export` takes, and the result that it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repvgg_deploy.artifacts import Parity, Precision, Preprocessing, PreprocessingOptions
from repvgg_deploy.checkpoints import Checkpoint, CheckpointOptions
from repvgg_deploy.engine.options import BuildOptions
from repvgg_deploy.graphs.layers import Fp16Rounding
from repvgg_deploy.graphs.repvgg import DEFAULT_OPSET, GraphOptions
from repvgg_deploy.workflows.choices import Choices

if TYPE_CHECKING:
    from repvgg_deploy.engine import Engine
    from repvgg_deploy.quantization.net import QuantizationSummary


@dataclass(frozen=True)
class Int8Request:
    """How an INT8 export is calibrated.

    Attributes:
        images: a folder of images, or a text file that lists them; None synthesizes images from the BN statistics of a
            checkpoint in training form.
        count: images to use, or to synthesize; the recipe's number by default.
        recipe: a name in `calibration/`, or a TOML file.
        cache: a file that keeps the statistics of a calibration for the next one.
        device: where to quantize, `cpu` or `cuda`.
        rest: the precision of what is not INT8.
        keep_float: layers that stay in that precision, by name.
        activation_type: of the zero-points after a ReLU. `int8` is for TensorRT before 10.10 alone.
        validation: labelled images for `max_drop`.
        max_drop: the most points of top-1 that may be lost; layers are kept in float until it is met.
        seconds: the time that synthesizing images may take; None for no limit.
        scales: the file of scales that `qat` wrote, instead of images.

    Example:
        >>> from repvgg_deploy import Int8Request
        >>> request = Int8Request(Path("images"), recipe="thorough")
        >>> request.activation_type
        'uint8'
    """

    images: Path | None
    count: int | None = None
    recipe: str | Path = "accurate"
    cache: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    rest: Precision = Precision.FP32
    keep_float: tuple[str, ...] = ()
    activation_type: Literal["uint8", "int8"] = "uint8"
    validation: Path | None = None
    max_drop: float | None = None
    seconds: float | None = None
    scales: Path | None = None


@dataclass(frozen=True)
class GraphRequest:
    """What the graph takes and gives, whatever the size of its images; see `GraphOptions`.

    Attributes:
        batch: a fixed batch, or None for a dynamic one.
        opset: of the default ONNX domain.
        io: type of the input and output tensors, fp32 or fp16.
        uint8_input: the graph takes uint8 NHWC pixels 0-255 and normalizes them itself.
        softmax: the output is `probabilities` instead of `logits`.
        topk: the outputs are the K largest `scores` and their `classes`.
        features: () for the pooled features instead of logits, stage numbers for the maps of these, None for logits.
        class_names: of the logits; by default those of the checkpoint.
    """

    batch: int | None = None
    opset: int = DEFAULT_OPSET
    io: Precision = Precision.FP32
    uint8_input: bool = False
    softmax: bool = False
    topk: int | None = None
    features: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def options(self, preprocessing: Preprocessing) -> GraphOptions:
        """The same for images of this size and normalization."""
        return GraphOptions(
            height=preprocessing.height,
            width=preprocessing.width,
            batch=self.batch,
            opset=self.opset,
            io=self.io,
            uint8_input=preprocessing if self.uint8_input else None,
            softmax=self.softmax,
            topk=self.topk,
        )


@dataclass(frozen=True)
class ExportRequest:
    """The request that `export` takes; see `BuildOptions` for the engine's part.

    Attributes:
        checkpoint: the file to export.
        output: the folder that the files go to.
        source: how the checkpoint is read.
        precision: of the graph's convolutions.
        preprocessing: what the user said of it.
        int8: needed for that precision.
        graph: what the graph takes and gives.
        verify_data: images that the stages are compared on; by default a few synthetic ones.
        verify_full: compare every stage at full size, on 16 images.
        engine: `auto`, `tensorrt`, `tensorrt-rtx` or `none`.
        build: how the engine is built.

    Example:
        >>> from repvgg_deploy import ExportRequest, Precision
        >>> request = ExportRequest(Path("net.pth"), Path("out"), precision=Precision.FP16)
        >>> str(request.precision)
        'fp16'
    """

    checkpoint: Path
    output: Path
    source: CheckpointOptions = field(default_factory=CheckpointOptions)
    precision: Precision = Precision.FP32
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    int8: Int8Request | None = None
    graph: GraphRequest = field(default_factory=GraphRequest)
    verify_data: Path | None = None
    verify_full: bool = False
    engine: str = "none"
    build: BuildOptions = field(default_factory=BuildOptions)


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote, and how each stage compares with the one before.

    `choices` are the settings that no tensor tells, see `describe_choices`.

    `parity` has `fused` (against the training form in float64), `quantized` (INT8 simulated, against fused), `onnx`
    (the graph in ONNX Runtime, against the stage before) and `engine` (where a GPU could run it).

    Example:
        >>> from repvgg_deploy import ExportRequest, export
        >>> result = export(ExportRequest(Path("net.pth"), Path("out")))
        >>> result.parity["onnx"].relative < 1e-4
        True
    """

    onnx: Path
    engine: Engine | None
    checkpoint: Checkpoint
    preprocessing: Preprocessing
    precision: Precision
    parameters: int
    ops: dict[str, int]
    parity: dict[str, Parity]
    rounding: Fp16Rounding | None
    quantization: QuantizationSummary | None
    choices: Choices
    seconds: float
    peak_bytes: int

    @property
    def arch(self) -> str:
        """The architecture's name."""
        return self.checkpoint.arch

    def to_dict(self) -> dict[str, Any]:
        """The object that `export --json` prints."""
        result: dict[str, Any] = {
            "onnx": str(self.onnx),
            "engine": None if self.engine is None else str(self.onnx.parent / self.engine.plan.name),
            "arch": self.checkpoint.arch,
            "layout": self.checkpoint.layout,
            "form": self.checkpoint.form,
            "precision": str(self.precision),
            "parameters": self.parameters,
            "sha256": self.checkpoint.sha256,
            "assumed": self.choices,
            "ops": self.ops,
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
        "kept_float": [row.name for row in summary.layers if row.kept_float],
        "layers": layers,
    }
