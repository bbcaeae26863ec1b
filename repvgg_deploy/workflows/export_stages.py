"""The stages of an export up to its graph: each gives a value, and how it compares with the stage before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from repvgg_deploy.artifacts import Array, Parity, Precision, Preprocessing, Provenance
from repvgg_deploy.checkpoints import Checkpoint, build
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.fusion.fuse import fuse, fuse_in_place
from repvgg_deploy.graphs.builder import OnnxGraph
from repvgg_deploy.graphs.layers import FP16_MAX, FloatLayers, Fp16Rounding
from repvgg_deploy.graphs.metadata import make_metadata
from repvgg_deploy.graphs.repvgg import to_onnx
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.nets.preprocessing import choose_preprocessing
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.progress import Progress
from repvgg_deploy.verification.inputs import VerificationInputs, choose_inputs
from repvgg_deploy.verification.parity import MAX_RELATIVE, compare_outputs, require_parity
from repvgg_deploy.verification.reference import run_fused, run_in_float64
from repvgg_deploy.workflows.checks import check_classes
from repvgg_deploy.workflows.choices import Choices, describe_choices, warn_of_choices
from repvgg_deploy.workflows.export_request import ExportRequest

if TYPE_CHECKING:
    from repvgg_deploy.quantization.net import QuantizationSummary

Outputs = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Prepared:
    """A fused net that computes what its training form does, and everything that its graph is made from.

    Attributes:
        request: what was requested.
        checkpoint: what was read, without its tensors.
        preprocessing: how images become its input.
        choices: the settings that no tensor tells.
        inputs: the pixels that all stages are compared on.
        class_names: of the outputs, where they are known.
        fused: the net in deploy form, float32.
        outputs: what it gives for `inputs.full`.
        largest: the largest magnitude of each convolution's output on them.
        training: the training form, where INT8 needs it.
    """

    request: ExportRequest
    checkpoint: Checkpoint
    preprocessing: Preprocessing
    choices: Choices
    inputs: VerificationInputs
    class_names: tuple[str, ...] | None
    fused: RepVGG
    outputs: Outputs
    largest: dict[str, float]
    training: RepVGG | None


@dataclass(frozen=True)
class Product:
    """A graph ready to be written, and what it must give for the full-size inputs, by output."""

    graph: OnnxGraph
    expected: Outputs
    rounding: Fp16Rounding | None = None
    quantization: QuantizationSummary | None = None


def prepare(request: ExportRequest, progress: Progress) -> tuple[Prepared, Parity]:
    """Read and fuse a checkpoint; the fused net against the training form in float64, on the small inputs.

    Raises:
        DeployError: the checkpoint cannot be read, or not as the request says.
        VerificationError: the two forms differ by more than float32 arithmetic does.
    """
    progress.note(f"reading {request.checkpoint}")
    checkpoint = request.source.load(request.checkpoint)
    for note in checkpoint.notes:
        progress.note(f"note: {note}")
    check_classes(request, checkpoint.spec)
    preprocessing = choose_preprocessing(checkpoint.spec, request.preprocessing, checkpoint.settings)
    choices = describe_choices(checkpoint, preprocessing, request.preprocessing)
    for warning in warn_of_choices(checkpoint, preprocessing, request.preprocessing):
        progress.note(f"warning: {warning}")
    taken = _take_outputs(checkpoint, request)
    class_names = _choose_class_names(taken, request)
    inputs = choose_inputs(taken.spec, preprocessing, request.verify_data, request.verify_full)
    progress.note(f"fusing {checkpoint.arch} ({checkpoint.layout}, {checkpoint.form} form)")
    net = build(taken)
    small, full = (normalize(pixels, preprocessing) for pixels in (inputs.small, inputs.full))
    reference = run_in_float64(net, small)
    # Only images synthesized from its BN statistics need the training form beyond this.
    synthesizes = request.int8 is not None and request.int8.images is None
    fused = fuse(net, torch.float32) if synthesizes else fuse_in_place(net)
    (outputs_small, outputs), largest = run_fused(fused, small, full)
    parity = compare_outputs(reference, outputs_small)
    require_parity("fusing", parity, MAX_RELATIVE["stage"]["fp32"])
    prepared = Prepared(
        request=request,
        checkpoint=checkpoint.without_tensors(),
        preprocessing=preprocessing,
        choices=choices,
        inputs=inputs,
        class_names=class_names,
        fused=fused,
        outputs=outputs,
        largest=largest,
        training=net if synthesizes else None,
    )
    return prepared, parity


def _take_outputs(checkpoint: Checkpoint, request: ExportRequest) -> Checkpoint:
    """The checkpoint as the graph needs it: whole, or the backbone that gives the features requested.

    Raises:
        DeployError: there is no such stage, or what was requested needs classes.
    """
    features = request.graph.features
    if features is None and checkpoint.spec.classes == 0:
        features = ()
    if features is None:
        return checkpoint
    for option, value in (("--topk", request.graph.topk), ("--labels", request.graph.class_names)):
        if value is not None:
            raise DeployError(f"{option} is for classes, and features have none", f"leave {option} or --features out")
    if request.int8 is not None and request.int8.max_drop is not None:
        raise DeployError("--max-drop is for classes, and features have none", "leave --max-drop or --features out")
    return checkpoint.backbone(features)


def _choose_class_names(checkpoint: Checkpoint, request: ExportRequest) -> tuple[str, ...] | None:
    """The labels of the request, or those of the checkpoint; none for features."""
    if checkpoint.spec.output_names != ("logits",):
        return None
    return checkpoint.class_names if request.graph.class_names is None else request.graph.class_names


def make_float_graph(prepared: Prepared) -> Product:
    """The graph in float32 or float16.

    Raises:
        GraphError: the net has no such graph.
        VerificationError: a convolution's output is beyond what float16 holds.
    """
    half = prepared.request.precision is Precision.FP16
    if half:
        _require_fp16_range(prepared.largest)
    layers = FloatLayers(np.dtype(np.float16 if half else np.float32))
    options = prepared.request.graph.options(prepared.preprocessing)
    graph = to_onnx(prepared.fused, layers, options, _metadata(prepared, {}))
    return Product(graph, prepared.outputs, layers.rounding if half else None)


def make_int8_graph(prepared: Prepared, for_engine: bool, progress: Progress) -> tuple[Product, Parity]:
    """The Q/DQ graph; the quantized net in torch against the fused one, on the full-size inputs.

    Raises:
        DeployError: there are no calibration images, or the request does not fit the net.
    """
    from repvgg_deploy.quantization.pair_sums import largest_pair_sum
    from repvgg_deploy.quantization.qdq import to_qdq_onnx, with_fp16_scales
    from repvgg_deploy.workflows.int8 import Int8Source, quantize_for_export

    request = prepared.request.int8
    if request is None:
        raise DeployError("INT8 needs calibration images", "--calib DIR, a folder of a few hundred typical images")
    source = Int8Source(prepared.fused, prepared.training, prepared.preprocessing, prepared.checkpoint.sha256)
    quantized, summary = quantize_for_export(source, request, for_engine, progress)
    if request.rest is Precision.FP16:
        quantized = with_fp16_scales(quantized)
    with torch.inference_mode():
        images = torch.from_numpy(normalize(prepared.inputs.full, prepared.preprocessing))
        # An int8 pair saturates at 127 in every runtime, a uint8 pair at 255 in ONNX Runtime, which runs the graph
        # next.
        computed = quantized if request.activation_type == "uint8" else quantized.as_tensorrt()
        expected: Outputs = {name: values.numpy() for name, values in computed.outputs(images).items()}
    about = {
        "recipe": summary.recipe,
        "images": summary.images,
        "images_sha256": summary.images_sha256,
        "calibrated_on": summary.calibrated_on,
        **({} if summary.pictures is None else {"pictures": summary.pictures.to_dict()}),
        "seed": summary.seed,
        "kept_float": list(quantized.float_layers()),
        "activation_type": request.activation_type,
        **({"full_range": True} if summary.full_range else {}),
        "largest_pair_sum": max(largest_pair_sum(layer.weight) for layer in quantized.integers().values()),
    }
    dtype = np.dtype(np.float16 if request.rest is Precision.FP16 else np.float32)
    options = prepared.request.graph.options(prepared.preprocessing)
    metadata = _metadata(prepared, {"quantization": about})
    graph = to_qdq_onnx(quantized, options, metadata, dtype, request.activation_type)
    return Product(graph, expected, None, summary), compare_outputs(prepared.outputs, expected)


def _metadata(prepared: Prepared, extra: dict[str, Any]) -> dict[str, str]:
    checkpoint, spec = prepared.checkpoint, prepared.fused.spec
    if spec.output_names != ("logits",):
        extra = {"outputs": list(spec.output_names), **extra}
    provenance = Provenance(
        sha256=checkpoint.sha256,
        arch=checkpoint.arch,
        layout=checkpoint.layout,
        form=checkpoint.form,
        precision=prepared.request.precision,
        preprocessing=prepared.preprocessing,
        class_names=prepared.class_names,
        tools=tool_versions(),
        extra={"classes": spec.classes, "assumed": prepared.choices, **extra},
    )
    return make_metadata(provenance)


def _require_fp16_range(largest: dict[str, float]) -> None:
    name, value = max(largest.items(), key=lambda item: item[1])
    if value > FP16_MAX:
        raise VerificationError(
            f"the output of {name} reaches {value:.3g}, and FP16 ends at {FP16_MAX:g}",
            "export with fp32 or --int8; the net cannot run in FP16",
        )


def tool_versions() -> dict[str, str]:
    """The versions of the libraries that shape a graph."""
    # From the metadata: importing onnxsim takes a third of a second, or as long as torch where it imports that.
    return {"torch": torch.__version__, "onnx": onnx.__version__, "onnxsim": version("onnxsim")}


def graph_inputs(prepared: Prepared) -> Array:
    """The full-size inputs as the graph takes them."""
    graph = prepared.request.graph
    if graph.uint8_input:
        return prepared.inputs.full
    dtype = np.float16 if graph.io is Precision.FP16 else np.float32
    return normalize(prepared.inputs.full, prepared.preprocessing).astype(dtype, copy=False)
