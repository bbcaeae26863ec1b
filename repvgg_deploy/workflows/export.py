"""The steps of an export: checkpoint → training net → fused net → ONNX graph → engine, each checked on the last."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repvgg_deploy.artifacts import Array, Parity, Precision, Preprocessing
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.simplification import SimplificationCheck
from repvgg_deploy.nets.cost import count_parameters
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.runtime.model import Model, softmax
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.verification.parity import MAX_RELATIVE, compare_outputs, require_parity
from repvgg_deploy.workflows.checks import check_request, has_full_range
from repvgg_deploy.workflows.engine_backend import choose_backend
from repvgg_deploy.workflows.export_request import ExportRequest
from repvgg_deploy.workflows.export_result import CheckpointExportResult
from repvgg_deploy.workflows.export_stages import (
    Outputs,
    Prepared,
    Product,
    graph_inputs,
    make_float_graph,
    make_int8_graph,
    prepare,
)

if TYPE_CHECKING:
    from repvgg_deploy.engine import Backend, Engine

Finish = Callable[[Path, Sequence[CheckpointExportResult]], None]
"""Called on the finished files in their staging folder, before they take their places: adds files, or raises."""


def export(
    request: ExportRequest,
    progress: Progress = SILENT,
    simplification: SimplificationCheck | None = None,
    finish: Finish | None = None,
) -> CheckpointExportResult:
    """Write the verified ONNX graph of a checkpoint to `request.output`, and an engine where one is asked for.

    The files are `<checkpoint stem>.<precision>.onnx`, `.plan` and `.plan.json`; they appear only when every stage has
    agreed with the one before.

    Args:
        request: what to export, and how.
        progress: receives the stages and their notes.
        simplification: a check that was started ahead, since it takes a second to load; by default it starts here.
        finish: called once everything has passed; see `Finish`.

    Raises:
        DeployError: any error that the user can fix; nothing is written then.

    Example:
        >>> from repvgg_deploy import ExportRequest, Precision, export
        >>> result = export(ExportRequest(Path("net.pth"), Path("out"), precision=Precision.FP16))
        >>> result.onnx.name
        'net.fp16.onnx'
    """
    start = time.perf_counter()
    with simplification or SimplificationCheck() as check:
        backend = check_possible(request, progress)
        result = export_prepared(partial(prepare, request, progress), backend, progress, check, finish)
    return replace(result, seconds=time.perf_counter() - start)


def check_possible(request: ExportRequest, progress: Progress) -> Backend | None:
    """The backend that builds the engine, if any; called before a checkpoint is read.

    Raises:
        DeployError: the request cannot be met, whatever is in the checkpoint.
    """
    if request.output.exists() and not request.output.is_dir():
        raise DeployError(f"{request.output} is a file, but a folder is needed", "-o DIR")
    if request.engine == "auto" and request.int8 is not None and has_full_range(request.int8):
        progress.note("no engine will be built: activations up to 255 are for ONNX Runtime and OpenVINO")
        backend = None
    else:
        backend = choose_backend(request.engine, progress)
    check_request(request, backend)
    return backend


def export_prepared(
    prepare: Callable[[], tuple[Prepared, Parity]],
    backend: Backend | None,
    progress: Progress,
    simplification: SimplificationCheck,
    finish: Finish | None = None,
) -> CheckpointExportResult:
    """The steps of `export` from a fused net on.

    `prepare` gives the net and how its fusing was verified. It is called here, so that the net can be freed here, once
    it is written: an engine's build needs the memory.

    Raises:
        DeployError: as `export`.
    """
    start = time.perf_counter()
    prepared, parity = prepare()
    request, parities = prepared.request, {"fused": parity}
    progress.note(f"making the {request.precision} graph")
    if request.precision is Precision.INT8:
        product, parities["quantized"] = make_int8_graph(prepared, backend is not None, progress)
    else:
        product = make_float_graph(prepared)
    simplification.submit(product.graph.without_values())
    result, images, expected = _describe(prepared, product), graph_inputs(prepared), product.expected
    with stage_files(request.output) as staging:
        staged = staging / result.onnx.name
        write_graph(product.graph, staged)
        # The weights are in the file now, which ONNX Runtime maps.
        del prepared, product
        progress.note("running the graph in ONNX Runtime")
        outputs, parities["onnx"] = _verify_graph(staged, images, expected, request, result.preprocessing)
        simplification.require()
        engine = None
        if backend is None:
            _note_other_engine(staged, result.onnx.with_suffix(".plan"), progress)
        else:
            engine, compared = _build_and_compare(staged, backend, request, images, outputs, progress)
            parities |= {} if compared is None else {"engine": compared}
        if finish is not None:
            finish(staging, (result,))
    seconds = time.perf_counter() - start
    return replace(result, engine=engine, parity=parities, seconds=seconds, peak_bytes=peak_bytes())


def _describe(prepared: Prepared, product: Product) -> CheckpointExportResult:
    """What will be written, except for the comparisons and costs."""
    request = prepared.request
    return CheckpointExportResult(
        onnx=request.output / f"{file_stem(request.checkpoint)}.{request.precision}.onnx",
        engine=None,
        checkpoint=prepared.checkpoint,
        preprocessing=prepared.preprocessing,
        precision=request.precision,
        sha256=prepared.checkpoint.sha256,
        parameters=count_parameters(prepared.fused.spec),
        ops=product.graph.op_histogram(),
        parity={},
        rounding=product.rounding,
        quantization=product.quantization,
        choices=prepared.choices,
        seconds=0.0,
        peak_bytes=0,
    )


def _note_other_engine(onnx: Path, plan: Path, progress: Progress) -> None:
    """Warn of an engine that will lie beside the graph and was built from another one."""
    if not plan.exists():
        return
    from repvgg_deploy.engine.sidecar import read_sidecar

    try:
        same = read_sidecar(plan).onnx_sha256 == hash_file(onnx)
    except DeployError:
        same = False
    if not same:
        progress.note(f"note: {plan} was built from another graph and is left unchanged")


def _verify_graph(
    path: Path, images: Array, expected: Outputs, request: ExportRequest, preprocessing: Preprocessing
) -> tuple[dict[str, Array], Parity]:
    """The outputs of the written graph in ONNX Runtime, once they have agreed with those expected."""
    runner = OnnxRunner(path, quick_start=True)
    half = request.graph.io is Precision.FP16
    model = Model(path, runner, preprocessing, None, takes_pixels=request.graph.uint8_input, half_input=half)
    outputs = model.run_images(images)
    reference, candidate = comparable(expected, outputs, request.graph.softmax)
    parity = compare_outputs(reference, candidate)
    allowed = MAX_RELATIVE["stage"]
    # A float16 input or output is rounded, whatever the layers compute in.
    require_parity("the ONNX graph", parity, max(allowed[request.precision], allowed[request.graph.io]))
    return outputs, parity


def _build_and_compare(
    staged: Path,
    backend: Any,
    request: ExportRequest,
    images: Array,
    outputs: dict[str, Array],
    progress: Progress,
) -> tuple[Engine, Parity | None]:
    """The engine in the staging folder; where a GPU can run it, its outputs have agreed with ONNX Runtime's."""
    from repvgg_deploy.engine import build_engine
    from repvgg_deploy.verification.engine import check_where_possible, run_as_engine

    progress.note(f"building the engine with {backend.label}")
    engine = build_engine(staged, backend, request.build, staged.parent, progress)

    def expected() -> Mapping[str, Array]:
        return run_as_engine(staged, images) if request.precision is Precision.INT8 else outputs

    return engine, check_where_possible(engine, images, expected, progress)


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


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
