"""The story of an export: checkpoint → training net → fused net → ONNX graph, each held against the one before."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch

from repvgg_deploy.artifacts import Parity, Precision, Preprocessing, Provenance
from repvgg_deploy.checkpoints import Checkpoint, build, load_checkpoint
from repvgg_deploy.cost import count_parameters
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.evaluate import softmax
from repvgg_deploy.fuse import fuse
from repvgg_deploy.images import normalize
from repvgg_deploy.model import Model, PreprocessingOptions, choose_preprocessing
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.onnx_export import (
    DEFAULT_OPSET,
    FP16_MAX,
    FloatLayers,
    Fp16Rounding,
    GraphOptions,
    make_metadata,
    to_onnx,
)
from repvgg_deploy.onnx_graph import write_graph
from repvgg_deploy.parity import compare, require_parity
from repvgg_deploy.reference import run_fused, run_in_float64
from repvgg_deploy.runners.onnx_runner import OnnxRunner
from repvgg_deploy.staging import flush_files, stage_files
from repvgg_deploy.verification import VerificationInputs, choose_inputs

Say = Callable[[str], None]

# Largest relative differences of the logits. Float32 arithmetic alone costs 1e-6 to 1e-5 on nets of this depth; FP16
# has a rounding of 5e-4, accumulated over the layers.
MAX_RELATIVE = {Precision.FP32: 1e-4, Precision.FP16: 3e-2}


@dataclass(frozen=True)
class ExportRequest:
    """All that `export` is asked for; see `GraphOptions` for the graph's."""

    checkpoint: Path
    output: Path
    arch: str | None = None
    ema: bool | None = None
    bn_eps: float = 1e-5
    precision: Precision = Precision.FP32
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    batch: int | None = None
    opset: int = DEFAULT_OPSET
    io: Precision = Precision.FP32
    uint8_input: bool = False
    softmax: bool = False
    topk: int | None = None
    class_names: tuple[str, ...] | None = None
    verify_data: Path | None = None
    verify_full: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote, and how it compares with what it was made from."""

    onnx: Path
    checkpoint: Checkpoint
    preprocessing: Preprocessing
    precision: Precision
    parameters: int
    ops: dict[str, int]
    parity: dict[str, Parity]
    rounding: Fp16Rounding | None
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
            "engine": None,
            "arch": self.checkpoint.arch,
            "layout": self.checkpoint.layout,
            "form": self.checkpoint.form,
            "precision": str(self.precision),
            "parameters": self.parameters,
            "sha256": self.checkpoint.sha256,
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
        return result


def export(request: ExportRequest, say: Say = lambda _: None) -> ExportResult:
    """Write the verified ONNX graph of a checkpoint to `request.output`.

    The file is `<checkpoint stem>.<precision>.onnx`; it appears only when every stage has agreed with the one before.

    Raises:
        DeployError: whatever the user can mend; nothing is written then.
    """
    start = time.perf_counter()
    say(f"reading {request.checkpoint}")
    checkpoint = load_checkpoint(request.checkpoint, request.arch, request.ema, request.bn_eps)
    for note in checkpoint.notes:
        say(f"note: {note}")
    preprocessing = choose_preprocessing(checkpoint, request.preprocessing)
    inputs = choose_inputs(checkpoint.spec, preprocessing, request.verify_data, request.verify_full)
    fused, parity = _fuse_and_compare(checkpoint, preprocessing, inputs, say)
    checkpoint = checkpoint.without_tensors()
    layers = FloatLayers(np.dtype(np.float16 if request.precision is Precision.FP16 else np.float32))
    say(f"exporting the {request.precision} graph")
    graph = to_onnx(
        fused, layers, _graph_options(request, preprocessing), _metadata(request, checkpoint, preprocessing)
    )
    expected, largest = run_fused(fused, normalize(inputs.full, preprocessing))
    if request.precision is Precision.FP16:
        _require_fp16_range(largest)
    name = f"{file_stem(request.checkpoint)}.{request.precision}.onnx"
    result = ExportResult(
        onnx=request.output / name,
        checkpoint=checkpoint,
        preprocessing=preprocessing,
        precision=request.precision,
        parameters=count_parameters(fused.spec),
        ops=graph.op_histogram(),
        parity=parity,
        rounding=layers.rounding if request.precision is Precision.FP16 else None,
        seconds=0.0,
        peak_bytes=0,
    )
    with stage_files(request.output) as staging:
        write_graph(graph, staging / name)
        # The weights are in the file now; ONNX Runtime brings its own copy.
        del fused, graph, layers
        say("running the graph in ONNX Runtime")
        with ThreadPoolExecutor(1) as pool:
            # The disk takes the file while the processor verifies it.
            flushed = pool.submit(flush_files, staging)
            parity["onnx"] = _compare_graph(staging / name, inputs, preprocessing, expected, request)
            flushed.result()
    seconds = time.perf_counter() - start
    return ExportResult(**{**vars(result), "seconds": seconds, "peak_bytes": peak_bytes()})


def _fuse_and_compare(
    checkpoint: Checkpoint,
    preprocessing: Preprocessing,
    inputs: VerificationInputs,
    say: Say,
) -> tuple[RepVGG, dict[str, Parity]]:
    """The fused net in float32, and how it compares with the training form in float64."""
    say(f"fusing {checkpoint.arch} ({checkpoint.layout}, {checkpoint.form} form)")
    net = build(checkpoint)
    images = normalize(inputs.small, preprocessing)
    reference = run_in_float64(net, images)
    fused = cast(RepVGG, fuse(net, torch.float32))
    candidate, _ = run_fused(fused, images)
    parity = {"fused": compare(reference, candidate)}
    require_parity("fusing", parity["fused"], MAX_RELATIVE[Precision.FP32])
    return fused, parity


def _graph_options(request: ExportRequest, preprocessing: Preprocessing) -> GraphOptions:
    return GraphOptions(
        height=preprocessing.height,
        width=preprocessing.width,
        batch=request.batch,
        opset=request.opset,
        io=request.io,
        uint8_input=preprocessing if request.uint8_input else None,
        softmax=request.softmax,
        topk=request.topk,
    )


def _metadata(request: ExportRequest, checkpoint: Checkpoint, preprocessing: Preprocessing) -> dict[str, str]:
    names = request.class_names or checkpoint.class_names
    if names is not None and len(names) != checkpoint.spec.classes:
        raise DeployError(
            f"{len(names)} labels for {checkpoint.spec.classes} classes", "the file of --labels has one class a line"
        )
    provenance = Provenance(
        sha256=checkpoint.sha256,
        arch=checkpoint.arch,
        layout=checkpoint.layout,
        form=checkpoint.form,
        precision=request.precision,
        preprocessing=preprocessing,
        class_names=names,
        tools=tool_versions(),
        extra={"classes": checkpoint.spec.classes},
    )
    return make_metadata(provenance)


def _require_fp16_range(largest: dict[str, float]) -> None:
    name, value = max(largest.items(), key=lambda item: item[1])
    if value > FP16_MAX:
        raise VerificationError(
            f"the output of {name} reaches {value:.3g}, and FP16 ends at {FP16_MAX:g}",
            "export with fp32 or --int8; the net cannot run in FP16",
        )


def _compare_graph(
    path: Path,
    inputs: VerificationInputs,
    preprocessing: Preprocessing,
    expected: np.ndarray[Any, np.dtype[np.float32]],
    request: ExportRequest,
) -> Parity:
    model = Model(
        path,
        OnnxRunner(path, quick_start=True),
        preprocessing,
        class_names=None,
        takes_pixels=request.uint8_input,
        half_input=request.io is Precision.FP16,
    )
    images = inputs.full if request.uint8_input else normalize(inputs.full, preprocessing)
    outputs = model.run_images(images)
    reference, candidate = comparable(expected, outputs, request.softmax)
    parity = compare(reference, candidate)
    require_parity("the ONNX graph", parity, MAX_RELATIVE[request.precision])
    return parity


def comparable(
    logits: np.ndarray[Any, Any], outputs: dict[str, np.ndarray[Any, Any]], as_probabilities: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What of the logits is to be compared with what a graph gives: all scores, or the best K of its own choice."""
    scores = softmax(logits) if as_probabilities else logits
    if "classes" not in outputs:
        return scores, next(iter(outputs.values()))
    return np.take_along_axis(scores, outputs["classes"], axis=1), outputs["scores"]


def file_stem(checkpoint: Path) -> str:
    """The name of a checkpoint without its endings: `a0` of `a0.pth.tar`."""
    name = checkpoint.name
    for ending in (".pth.tar", ".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin"):
        if name.endswith(ending) and name != ending:
            return name.removesuffix(ending)
    return checkpoint.stem


def tool_versions() -> dict[str, str]:
    """The versions of the libraries that shape a graph."""
    import onnxsim

    return {"torch": torch.__version__, "onnx": onnx.__version__, "onnxsim": onnxsim.__version__}


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
