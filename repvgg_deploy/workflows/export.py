"""The story of an export: checkpoint → training net → fused net → ONNX graph → engine, each held against the last."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from repvgg_deploy.artifacts import Array, Parity, Precision, Preprocessing, Provenance
from repvgg_deploy.checkpoints import Checkpoint, build
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.files import flush_files, hash_file, stage_files
from repvgg_deploy.fusion.fuse import Fusion, begin_fusion
from repvgg_deploy.graphs.builder import OnnxGraph, write_graph
from repvgg_deploy.graphs.layers import FP16_MAX, FloatLayers, Fp16Rounding
from repvgg_deploy.graphs.metadata import make_metadata
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.graphs.simplification import SimplificationCheck
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.nets.cost import count_parameters
from repvgg_deploy.nets.preprocessing import choose_preprocessing
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.runtime.model import Model, softmax
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.threads import start_workers
from repvgg_deploy.verification.inputs import VerificationInputs, choose_inputs
from repvgg_deploy.verification.parity import compare_outputs, require_parity
from repvgg_deploy.verification.reference import run_fused, run_in_float64
from repvgg_deploy.workflows.checks import check_classes, check_request
from repvgg_deploy.workflows.choices import Choices, describe_choices, warn_of_choices
from repvgg_deploy.workflows.export_request import ExportRequest, ExportResult

if TYPE_CHECKING:
    from repvgg_deploy.engine import Engine
    from repvgg_deploy.quantization.net import QuantizationSummary

Outputs = Mapping[str, NDArray[np.float32]]

# Largest relative differences of the logits. Float32 arithmetic alone costs 1e-6 to 1e-5 on nets of this depth; FP16
# has a rounding of 5e-4, accumulated over the layers; in INT8 a value on the border between two steps may fall to
# either side.
MAX_RELATIVE = {Precision.FP32: 1e-4, Precision.FP16: 3e-2, Precision.INT8: 1e-1}


@dataclass(frozen=True)
class _Product:
    """A graph ready to be written, and `run`, which gives what it must give on the full-size inputs, by output.

    `run` fails where the stages before the graph do not agree.
    """

    graph: OnnxGraph
    run: Callable[[], Outputs]
    rounding: Fp16Rounding | None = None
    quantization: QuantizationSummary | None = None


def export(
    request: ExportRequest, progress: Progress = SILENT, simplification: SimplificationCheck | None = None
) -> ExportResult:
    """Write the verified ONNX graph of a checkpoint to `request.output`, and an engine where one is asked for.

    The files are `<checkpoint stem>.<precision>.onnx`, `.plan` and `.plan.json`; they appear only when every stage has
    agreed with the one before.

    Args:
        request: what to export, and how.
        progress: receives the stages and their notes.
        simplification: a check that was started ahead, since it takes a second to load; by default it starts here.

    Raises:
        DeployError: whatever the user can mend; nothing is written then.

    Example:
        >>> from repvgg_deploy import ExportRequest, Precision, export
        >>> result = export(ExportRequest(Path("net.pth"), Path("out"), precision=Precision.FP16))
        >>> result.onnx.name
        'net.fp16.onnx'
    """
    with simplification or SimplificationCheck() as check:
        return _export(request, progress, check)


def _export(request: ExportRequest, progress: Progress, simplification: SimplificationCheck) -> ExportResult:
    start = time.perf_counter()
    if request.output.exists() and not request.output.is_dir():
        raise DeployError(f"{request.output} is a file, and the files go to a folder", "-o DIR")
    backend = _find_backend(request, progress)
    check_request(request, backend)
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
    inputs = choose_inputs(taken.spec, preprocessing, request.verify_data, request.verify_full)
    progress.note(f"fusing {checkpoint.arch} ({checkpoint.layout}, {checkpoint.form} form)")
    net = build(taken)
    # Before the net runs in another thread: torch traces a net by replacing what calls every module of the process.
    fusion = begin_fusion(net, torch.float32)
    with start_workers(1) as reference:
        # Fusing takes one core; what it will be held against is computed on the other.
        trained = reference.submit(run_in_float64, net, normalize(inputs.small, preprocessing))
        known = checkpoint.without_tensors()
        # Only pictures made from its BN statistics need the training form beyond this.
        training = net if request.int8 is not None and request.int8.images is None else None
        stage = _Stage(request, known, fusion, trained, preprocessing, choices, inputs, training)
        del checkpoint, taken, net, fusion, trained
        parity: dict[str, Parity] = {}
        progress.note(f"making the {request.precision} graph")
        if request.precision is Precision.INT8:
            product = _make_int8_graph(stage, parity, backend is not None, progress)
        else:
            product = _make_float_graph(stage, parity)
        simplification.submit(product.graph.without_values())
        result = ExportResult(
            onnx=request.output / f"{file_stem(request.checkpoint)}.{request.precision}.onnx",
            engine=None,
            checkpoint=stage.checkpoint,
            preprocessing=preprocessing,
            precision=request.precision,
            parameters=count_parameters(stage.unfinished.spec),
            ops=product.graph.op_histogram(),
            parity=parity,
            rounding=product.rounding,
            quantization=product.quantization,
            choices=choices,
            seconds=0.0,
            peak_bytes=0,
        )
        with stage_files(request.output) as staging, start_workers(2) as pool:
            staged = staging / result.onnx.name
            # Block by block: computed, written and run.
            finished = pool.submit(stage.fusion.finish)
            written = pool.submit(write_graph, product.graph, staged, wait_for=stage.fusion.wait_for)
            expected = product.run()
            finished.result()
            written.result()
            # The weights are in the file now, which ONNX Runtime maps.
            del stage, product
            progress.note("running the graph in ONNX Runtime")
            flushed = pool.submit(flush_files, staging)
            outputs = _run_and_compare(staged, inputs, preprocessing, expected, request, parity)
            flushed.result()
            simplification.require()
            engine = None
            if backend is None:
                _note_other_engine(staged, result.onnx.with_suffix(".plan"), progress)
            else:
                engine = _build_and_compare(staged, backend, request, inputs, preprocessing, outputs, parity, progress)
    seconds = time.perf_counter() - start
    return replace(result, engine=engine, seconds=seconds, peak_bytes=peak_bytes())


def _take_outputs(checkpoint: Checkpoint, request: ExportRequest) -> Checkpoint:
    """The checkpoint as the graph needs it: whole, or the backbone that gives the features asked for.

    Raises:
        DeployError: there is no such stage, or what was asked for needs classes.
    """
    features = request.features
    if features is None and checkpoint.spec.classes == 0:
        features = ()
    if features is None:
        return checkpoint
    for option, value in (("--topk", request.topk), ("--labels", request.class_names)):
        if value is not None:
            raise DeployError(f"{option} is for classes, and features have none", f"leave {option} or --features out")
    if request.int8 is not None and request.int8.max_drop is not None:
        raise DeployError("--max-drop is for classes, and features have none", "leave --max-drop or --features out")
    return checkpoint.backbone(features)


def _note_other_engine(onnx: Path, plan: Path, progress: Progress) -> None:
    """Tell of an engine that will stand beside the graph and was built from another one."""
    if not plan.exists():
        return
    from repvgg_deploy.engine.sidecar import read_sidecar

    try:
        same = read_sidecar(plan).onnx_sha256 == hash_file(onnx)
    except DeployError:
        same = False
    if not same:
        progress.note(f"note: {plan} was built from another graph, and stays as it is")


def _find_backend(request: ExportRequest, progress: Progress) -> Any:
    """The engine backend, asked for before any work is done: a named one that is missing is an error at once."""
    name = request.engine
    if name == "none":
        return None
    from repvgg_deploy.engine import Unavailable, find_backend

    backend = find_backend(name)
    if isinstance(backend, Unavailable):
        progress.note(f"no engine will be built: {backend.reason}")
        return None
    return backend


@dataclass(frozen=True)
class _Stage:
    """A net between fusing and its graph: the fused form, what the training form gives, and on what.

    `trained`: the outputs of the training form in float64 on `inputs.small`; `training`: that form itself, where it is
    needed still.
    """

    request: ExportRequest
    checkpoint: Checkpoint
    fusion: Fusion
    trained: Future[dict[str, NDArray[np.float64]]]
    preprocessing: Preprocessing
    choices: Choices
    inputs: VerificationInputs
    training: RepVGG | None = None

    @property
    def unfinished(self) -> RepVGG:
        """The fused net, its kernels perhaps without their values."""
        return cast(RepVGG, self.fusion.net)

    @property
    def fused(self) -> RepVGG:
        """The fused net."""
        self.fusion.finish()
        return self.unfinished

    def run(self, parity: dict[str, Parity]) -> tuple[Outputs, dict[str, float]]:
        """The fused net's outputs in float32 on `inputs.full`, and the largest magnitude of each convolution.

        How it compares with the training form on `inputs.small` goes to `parity`.

        Raises:
            VerificationError: they differ by more than float32 arithmetic does.
        """
        small, full = (normalize(pixels, self.preprocessing) for pixels in (self.inputs.small, self.inputs.full))
        (fused, outputs), largest = run_fused(self.unfinished, small, full, wait_for=self.fusion.wait_for)
        parity["fused"] = compare_outputs(self.trained.result(), fused)
        require_parity("fusing", parity["fused"], MAX_RELATIVE[Precision.FP32])
        return outputs, largest


def _make_float_graph(stage: _Stage, parity: dict[str, Parity]) -> _Product:
    half = stage.request.precision is Precision.FP16
    layers = FloatLayers(np.dtype(np.float16 if half else np.float32))
    # In float32 the weights are shared, not copied, so the graph can be made before they have their values.
    net = stage.fused if half else stage.unfinished
    graph = to_onnx(net, layers, _graph_options(stage), _metadata(stage, {}))

    def run() -> Outputs:
        outputs, largest = stage.run(parity)
        if half:
            _require_fp16_range(largest)
        return outputs

    return _Product(graph, run, layers.rounding if half else None)


def _make_int8_graph(stage: _Stage, parity: dict[str, Parity], for_engine: bool, progress: Progress) -> _Product:
    from repvgg_deploy.quantization.pair_sums import largest_pair_sum
    from repvgg_deploy.quantization.qdq import to_qdq_onnx, with_fp16_scales
    from repvgg_deploy.workflows.int8 import Int8Source, quantize_for_export

    request = stage.request.int8
    if request is None:
        raise DeployError("INT8 needs calibration images", "--calib DIR, a folder of a few hundred typical images")
    # Before the calibration, which takes longer than all the rest.
    fused = stage.fused
    reference, _ = stage.run(parity)
    source = Int8Source(fused, stage.training, stage.preprocessing, stage.checkpoint.sha256)
    quantized, summary = quantize_for_export(source, request, for_engine, progress)
    if request.rest is Precision.FP16:
        quantized = with_fp16_scales(quantized)
    with torch.inference_mode():
        images = torch.from_numpy(normalize(stage.inputs.full, stage.preprocessing))
        computed = quantized if request.activation_type == "uint8" else quantized.as_tensorrt()
        expected: Outputs = {name: values.numpy() for name, values in computed.outputs(images).items()}
    parity["quantized"] = compare_outputs(reference, expected)
    about = {
        "recipe": summary.recipe,
        "images": summary.images,
        "images_sha256": summary.images_sha256,
        "calibrated_on": summary.calibrated_on,
        **({} if summary.pictures is None else {"pictures": summary.pictures.to_dict()}),
        "seed": summary.seed,
        "kept_float": list(quantized.float_layers()),
        "activation_type": request.activation_type,
        "largest_pair_sum": max(largest_pair_sum(layer.weight) for layer in quantized.integers().values()),
    }
    dtype = np.dtype(np.float16 if request.rest is Precision.FP16 else np.float32)
    metadata = _metadata(stage, {"quantization": about})
    graph = to_qdq_onnx(quantized, _graph_options(stage), metadata, dtype, request.activation_type)
    return _Product(graph, lambda: expected, None, summary)


def _graph_options(stage: _Stage) -> GraphOptions:
    request, preprocessing = stage.request, stage.preprocessing
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


def _metadata(stage: _Stage, extra: dict[str, Any]) -> dict[str, str]:
    checkpoint = stage.checkpoint
    wanted = stage.request.class_names
    names = checkpoint.class_names if wanted is None else wanted
    outputs = stage.unfinished.spec.output_names
    if outputs != ("logits",):
        names, extra = None, {"outputs": list(outputs), **extra}
    if names is not None and len(names) != checkpoint.spec.classes:
        raise DeployError(
            f"{len(names)} labels for {checkpoint.spec.classes} classes", "the file of --labels has one class a line"
        )
    provenance = Provenance(
        sha256=checkpoint.sha256,
        arch=checkpoint.arch,
        layout=checkpoint.layout,
        form=checkpoint.form,
        precision=stage.request.precision,
        preprocessing=stage.preprocessing,
        class_names=names,
        tools=tool_versions(),
        extra={"classes": stage.unfinished.spec.classes, "assumed": stage.choices, **extra},
    )
    return make_metadata(provenance)


def _require_fp16_range(largest: dict[str, float]) -> None:
    name, value = max(largest.items(), key=lambda item: item[1])
    if value > FP16_MAX:
        raise VerificationError(
            f"the output of {name} reaches {value:.3g}, and FP16 ends at {FP16_MAX:g}",
            "export with fp32 or --int8; the net cannot run in FP16",
        )


def _run_and_compare(
    path: Path,
    inputs: VerificationInputs,
    preprocessing: Preprocessing,
    expected: Outputs,
    request: ExportRequest,
    parity: dict[str, Parity],
) -> dict[str, Array]:
    """The outputs of the written graph in ONNX Runtime, once they have agreed with those expected."""
    runner = OnnxRunner(path, quick_start=True)
    model = Model(path, runner, preprocessing, None, takes_pixels=request.uint8_input, half_input=_is_half(request))
    outputs = model.run_images(_inputs_of(request, inputs, preprocessing))
    reference, candidate = comparable(expected, outputs, request.softmax)
    parity["onnx"] = compare_outputs(reference, candidate)
    require_parity("the ONNX graph", parity["onnx"], max(MAX_RELATIVE[request.precision], MAX_RELATIVE[request.io]))
    return outputs


def _is_half(request: ExportRequest) -> bool:
    return request.io is Precision.FP16


def _inputs_of(request: ExportRequest, inputs: VerificationInputs, preprocessing: Preprocessing) -> Array:
    """The full-size inputs as the graph takes them."""
    if request.uint8_input:
        return inputs.full
    return normalize(inputs.full, preprocessing).astype(np.float16 if _is_half(request) else np.float32, copy=False)


def _build_and_compare(
    staged: Path,
    backend: Any,
    request: ExportRequest,
    inputs: VerificationInputs,
    preprocessing: Preprocessing,
    outputs: dict[str, Array],
    parity: dict[str, Parity],
    progress: Progress,
) -> Engine:
    """The engine in the staging folder; where a GPU can run it, its outputs have agreed with ONNX Runtime's."""
    from repvgg_deploy.engine import build_engine
    from repvgg_deploy.verification.engine import check_where_possible, run_as_engine

    progress.note(f"building the engine with {backend.label}")

    engine = build_engine(staged, backend, request.build, staged.parent, progress)
    images = _inputs_of(request, inputs, preprocessing)

    def expected() -> Mapping[str, Array]:
        return run_as_engine(staged, images) if request.precision is Precision.INT8 else outputs

    compared = check_where_possible(engine, images, expected, progress)
    if compared is not None:
        parity["engine"] = compared
    return engine


def comparable(expected: Outputs, outputs: dict[str, Array], as_probabilities: bool) -> tuple[Outputs, Outputs]:
    """What is expected and what a graph gives under the same names: all scores, or the best K of the graph's choice."""
    if "logits" not in expected:
        return expected, outputs
    scores = softmax(expected["logits"]) if as_probabilities else expected["logits"]
    if "classes" not in outputs:
        return {"scores": scores}, {"scores": next(iter(outputs.values()))}
    return {"scores": np.take_along_axis(scores, outputs["classes"], axis=1)}, {"scores": outputs["scores"]}


def file_stem(checkpoint: Path) -> str:
    """The name of a checkpoint without its endings: `a0` of `a0.pth.tar`."""
    name = checkpoint.name
    for ending in (".pth.tar", ".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin"):
        if name.endswith(ending) and name != ending:
            return name.removesuffix(ending)
    return checkpoint.stem


def tool_versions() -> dict[str, str]:
    """The versions of the libraries that shape a graph."""
    # Importing onnxsim takes nearly as long as importing torch.
    return {"torch": torch.__version__, "onnx": onnx.__version__, "onnxsim": version("onnxsim")}


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
