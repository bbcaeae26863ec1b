"""The request that `export` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from repvgg_deploy.artifacts import Precision, Preprocessing, PreprocessingOptions
from repvgg_deploy.checkpoints import CheckpointOptions
from repvgg_deploy.engine.options import BuildOptions
from repvgg_deploy.graphs.repvgg import DEFAULT_OPSET, GraphOptions


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
        full_range: activations after a ReLU go to 255 instead of 127. ONNX Runtime and OpenVINO compute finer with it;
            TensorRT does not have these integers, and no engine is built.
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
    full_range: bool = False
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
