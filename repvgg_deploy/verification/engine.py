"""Check that a built engine computes what its ONNX graph computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from onnx import load, save

from repvgg_deploy.artifacts import Array, Parity
from repvgg_deploy.engine.backends import Backend, import_backend
from repvgg_deploy.engine.building import Engine
from repvgg_deploy.engine.runner import EngineRunner, open_engine
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.files.staging import scratch_folder
from repvgg_deploy.hardware.gpus import find_gpus
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.verification.parity import MAX_RELATIVE, compare_outputs, require_parity


def check_engine(runner: EngineRunner, images: Array, expected: Mapping[str, Array]) -> Parity:
    """How the engine's outputs on `images` differ from those that ONNX Runtime gives for the same graph.

    `images` is as the engine takes it, `expected` the outputs of the graph by name: `logits` or `probabilities`,
    the `scores` and `classes` of a top-k, or features.

    Raises:
        VerificationError: the outputs are all zero, NaN or constant, or too far from those expected.
    """
    return compare_with_graph(runner.run(images), expected, runner.precision)


def compare_with_graph(outputs: Mapping[str, Array], expected: Mapping[str, Array], precision: str) -> Parity:
    """How an engine's outputs differ from those expected; see `check_engine`."""
    names = [name for name in expected if name != "classes"]
    for name in names:
        require_signal(outputs[name])
    parity = compare_outputs({name: expected[name] for name in names}, {name: outputs[name] for name in names})
    if "classes" in expected:
        # The K scores are sorted, so their argmax says nothing; the classes beside them do.
        same = expected["classes"][:, 0] == outputs["classes"][:, 0]
        parity = Parity(parity.max_abs, parity.relative, parity.cosine, 100 * float(same.mean()), parity.images)
    require_parity("the engine", parity, MAX_RELATIVE["engine"][precision])
    return parity


def check_where_possible(
    engine: Engine,
    images: Array,
    expected: Callable[[], Mapping[str, Array]],
    progress: Progress = SILENT,
) -> Parity | None:
    """`check_engine` on the GPU of this machine; None, with a note that says why, if no GPU can run `engine`.

    `expected` gives the outputs to compare with, and is asked where the engine runs.

    Raises:
        VerificationError: the engine computes something else than its graph.
        DeployError: the GPU should run it, and does not.
    """
    outputs = run_where_possible(engine, images, progress)
    return None if outputs is None else compare_with_graph(outputs, expected(), engine.side.precision)


def run_where_possible(engine: Engine, images: Array, progress: Progress = SILENT) -> dict[str, Array] | None:
    """The outputs of `engine` on the GPU of this machine; None, with a note that says why, if no GPU can run it.

    A GPU that the library does not list is tried all the same; only what it computes there can fail the build.

    Raises:
        DeployError: the GPU should run it, and does not.
    """
    found = find_gpus()
    if not found.gpus:
        progress.note(f"note: the engine was built but not run: {found.reason}")
        return None
    if not engine.side.has_weights:
        progress.note("note: the engine was built without weights, so it was not run")
        return None
    try:
        runner = open_engine(engine.plan)
    except DeployError as error:
        backend = import_backend(engine.side.backend)
        if isinstance(backend, Backend) and not backend.supports(found.gpus[0]):
            progress.note(f"note: the engine was built but not run: {error.message}")
            return None
        raise
    with runner:
        return runner.run(images)


def run_as_engine(onnx: Path, images: Array) -> dict[str, Array]:
    """The outputs of a graph in ONNX Runtime, with the activations of an INT8 graph saturating as in TensorRT."""
    runner = OnnxRunner(onnx)
    if runner.precision != "int8":
        return runner.run(images)
    from repvgg_deploy.quantization.qdq import as_tensorrt_reads

    with scratch_folder() as scratch:
        read = scratch / onnx.name
        save(as_tensorrt_reads(load(onnx)), read)
        return OnnxRunner(read).run(images)


def require_signal(scores: Array) -> None:
    """Raise VerificationError unless `scores` (images, …) could be those of a working net.

    Seen in the field: RepVGG-B1 in FP16 gave all zeros (NVIDIA/TensorRT#3548), which agrees with itself.

    Raises:
        VerificationError: the scores contain NaN or Inf, are all zero or all the same, or do not depend on the image.
    """
    values = scores.astype(np.float64).reshape(len(scores), -1)
    what = None
    if not np.isfinite(values).all():
        what = "NaN or Inf"
    elif not values.any():
        what = "zeros only"
    elif values.shape[1] > 1 and (np.ptp(values, axis=1) == 0).any():
        what = "the same score for every class"
    elif len(values) > 1 and (np.ptp(values, axis=0) == 0).all():
        what = "the same scores for every image"
    if what is not None:
        raise VerificationError(f"the engine gives {what}", "export with fp32, and report the GPU and the versions")
