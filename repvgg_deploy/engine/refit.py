"""New weights into an engine that was built refittable or without weights: no rebuild."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from repvgg_deploy.artifacts import Precision, Provenance
from repvgg_deploy.engine.backends import Backend, has
from repvgg_deploy.engine.building import Engine, require_signed_range
from repvgg_deploy.engine.loading import LoadedEngine, check_plan, load_plan
from repvgg_deploy.engine.log import collect_messages, construct, explain_failure, get_logger
from repvgg_deploy.engine.sidecar import Sidecar, sidecar_path
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.graphs.metadata import read_metadata
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.graphs.serialization import read_onnx_metadata
from repvgg_deploy.hardware.threads import run_cancellable
from repvgg_deploy.nets.settings import recorded_structure

_REBUILD = "build the engine with --refittable: `repvgg-deploy export CHECKPOINT --refittable`"


def require_refittable(plan: Path) -> Sidecar:
    """The sidecar of a plan that takes new weights.

    Raises:
        DeployError: there is none, the plan is not what was built, or it was not built to be refitted with new weights.
    """
    _, side = check_plan(plan)
    assert side is not None  # Only a trusted plan has none.
    if not side.options.needs_refit:
        raise DeployError(f"{plan} was not built to be refitted with new weights", _REBUILD)
    return side


def graph_options(side: Sidecar) -> GraphOptions:
    """The graph that a checkpoint must be exported to so that its weights fit the engine of `side`.

    A softmax has no weights, so after a top-k it need not be known.

    Raises:
        DeployError: the engine was not built from a graph of this tool.
    """
    provenance = side.provenance
    if provenance is None:
        raise DeployError("the engine was not built from a graph of this tool", "refit it from an ONNX graph instead")
    images, first = side.inputs[0], side.outputs[0]
    pixels = images.dtype == "uint8"
    height, width = images.shape[1:3] if pixels else images.shape[2:4]
    return GraphOptions(
        height=height,
        width=width,
        batch=images.shape[0] if images.shape[0] > 0 else None,
        io=Precision.FP16 if first.dtype == "float16" else Precision.FP32,
        uint8_input=provenance.preprocessing if pixels else None,
        softmax=first.name == "probabilities",
        topk=first.shape[-1] if any(output.name == "classes" for output in side.outputs) else None,
    )


def require_same_net(side: Sidecar, graph: Provenance | None) -> None:
    """Raise DeployError unless the graph has the architecture and the precision of the engine.

    Raises:
        DeployError: the architecture or the precision differs.
    """
    if graph is None or side.provenance is None:
        return
    for what in ("arch", "precision"):
        built, new = (str(getattr(provenance, what)) for provenance in (side.provenance, graph))
        if built != new:
            raise DeployError(
                f"the engine is {built}, but the new weights are {new}", "refit needs the same architecture"
            )
    old, given = (recorded_structure(known.extra.get("assumed")) for known in (side.provenance, graph))
    for what in ("strides", "activation"):
        built, new = getattr(old, what), getattr(given, what)
        if built is not None and new is not None and built != new:
            raise DeployError(
                f"the engine has the {what} {built}, but the net of the new weights has {new}", "build a new engine"
            )


def refit_engine(plan: Path, onnx: Path, folder: Path) -> Engine:
    """Put the weights of `onnx` into the engine of `plan`; the new plan and sidecar go to `folder` (`stage_files`).

    `onnx` is a graph of the same net: same nodes and names, as `export` makes it from any checkpoint of one
    architecture. The new plan has the name of the old one and holds all weights. It stays refittable, except with
    TensorRT before 10.14; the sidecar says so.

    Raises:
        DeployError: the plan does not take new weights, the graph is of another net, or there is no GPU.
    """
    side = require_refittable(plan)
    provenance = read_metadata(read_onnx_metadata(onnx))
    require_signed_range(onnx, provenance)
    require_same_net(side, provenance)
    loaded = load_plan(plan, for_refit=True)
    try:
        _put_weights(loaded, onnx)
        content = _serialize(loaded)
        target = folder / plan.name
        target.write_bytes(content)
    finally:
        loaded.close()
    changed = replace(
        describe_refitted(side, loaded.backend),
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(memoryview(content)),
        onnx_sha256=hash_file(onnx),
        provenance=provenance,
    )
    sidecar_path(target).write_text(changed.to_json(), encoding="utf-8")
    return Engine(target, changed)


def describe_refitted(side: Sidecar, backend: Backend) -> Sidecar:
    """What is to be said of an engine with new weights: it holds them, and takes others where the library can say so.

    A plan that TensorRT before 10.14 writes with its weights is not refittable: it lacks INCLUDE_REFIT.
    """
    if has(backend.module, "SerializationFlag.INCLUDE_REFIT"):
        return replace(side, has_weights=True)
    return replace(
        side,
        has_weights=True,
        options=replace(side.options, refittable=False, strip_weights=False),
        warnings=(*side.warnings, f"{backend.label} writes a refitted engine that cannot be refitted again"),
    )


def _put_weights(loaded: LoadedEngine, onnx: Path) -> None:
    trt = loaded.backend.module
    logger = get_logger(loaded.backend)
    with collect_messages(loaded.backend) as messages:
        doing = f"preparing {loaded.plan} for new weights"
        refitter = construct(loaded.backend, doing, messages, lambda: trt.Refitter(loaded.engine, logger))
        parser = construct(loaded.backend, doing, messages, lambda: trt.OnnxParserRefitter(refitter, logger))
        if not run_cancellable(lambda: parser.refit_from_file(str(onnx))):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            # Before what was logged: the parser's reasons name a node, and the first one is what a user sees.
            messages.errors[:0] = errors
            raise explain_failure(loaded.backend, f"taking the weights of {onnx.name}", messages)
        missing = refitter.get_missing_weights()
        if missing:
            raise DeployError(
                f"{onnx.name} lacks {len(missing)} weights of the engine, the first of them {missing[0]}",
                "give a graph of the same architecture and options",
            )
        if not run_cancellable(lambda: refitter.refit_cuda_engine()):
            raise explain_failure(loaded.backend, f"refitting {loaded.plan}", messages)


def _serialize(loaded: LoadedEngine) -> Any:
    """The engine with its weights as a plan, which can be refitted again where the library has a flag for it."""
    trt = loaded.backend.module
    config = loaded.engine.create_serialization_config()
    # With the weights that can be refitted as well: the plan has to run without another refit.
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if has(trt, "SerializationFlag.INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    with collect_messages(loaded.backend) as messages:
        content = loaded.engine.serialize_with_config(config)
        if content is None:
            raise explain_failure(loaded.backend, "writing the refitted engine", messages)
    return content
