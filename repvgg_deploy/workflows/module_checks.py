"""How the stages of a whole network's export compare: the fused module, its graph, the quantized graph, the engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from repvgg_deploy.artifacts import Array, Parity, Precision
from repvgg_deploy.errors import VerificationError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.torch_export import Signature
from repvgg_deploy.progress import Progress
from repvgg_deploy.runtime.session import GraphSession
from repvgg_deploy.verification.outputs import compare_each, require_all
from repvgg_deploy.verification.parity import MAX_RELATIVE
from repvgg_deploy.workflows.module_inputs import cast, leaves, run_module
from repvgg_deploy.workflows.module_int8 import Feeds, QuantizedGraph

if TYPE_CHECKING:
    from repvgg_deploy.engine import Engine

# Fused and original in float64; what is left is rounding.
_MAX_FLOAT64 = 1e-9
_CALIBRATION_COMPARED = 8


@dataclass(frozen=True)
class ModuleStage:
    """A module between fusing and its graph; `others` are random inputs, of another size where that is dynamic."""

    original: nn.Module
    fused: nn.Module
    blocks: tuple[str, ...]
    signature: Signature
    example: tuple[Tensor, ...]
    others: tuple[Tensor, ...]

    def feeds(self, tensors: Sequence[Tensor]) -> Feeds:
        """The inputs by name, for ONNX Runtime."""
        return {name: tensor.numpy() for name, tensor in zip(self.signature.inputs, tensors, strict=True)}


@dataclass(frozen=True)
class MadeGraph:
    """The graph to write; in INT8, how it was quantized and what it was calibrated on."""

    model: onnx.ModelProto
    quantized: QuantizedGraph | None = None
    examples: tuple[Feeds, ...] = ()


def compare_fused(stage: ModuleStage) -> dict[str, Parity]:
    """How the fused module differs from the original, in float64 where it runs in that.

    Raises:
        VerificationError: by more than rounding.
    """
    dtype: torch.dtype | None = torch.float64
    try:
        run_module(copy.deepcopy(stage.original).double(), cast(stage.example, dtype))
    except RuntimeError:
        # A forward that makes float32 tensors of its own.
        dtype = None
    limit = _MAX_FLOAT64 if dtype is not None else MAX_RELATIVE["stage"]["fp32"]
    worst: dict[str, Parity] = {}
    # Fused anew from float64: the rounding of its weights to float32 is what the graph is compared with later.
    nets = [copy.deepcopy(stage.original).to(dtype), fuse(copy.deepcopy(stage.original).to(dtype)).eval()]
    for tensors in (stage.example, stage.others):
        expected, given = (_named(stage, run_module(net, cast(tensors, dtype))) for net in nets)
        compared = compare_each(expected, given)
        require_all("fusing", compared, limit)
        worst = {
            name: max(parity, worst.get(name, parity), key=lambda p: p.relative) for name, parity in compared.items()
        }
    return worst


def compare_graph(
    staged: Path, exported: onnx.ModelProto, stage: ModuleStage, made: MadeGraph, precision: Precision
) -> dict[str, dict[str, Parity]]:
    """How the written graph's outputs in ONNX Runtime differ from those of the stage before, which may be INT8's own.

    Raises:
        VerificationError: by more than the precision's rounding; INT8 by more than the outputs themselves.
    """
    session = GraphSession(staged)
    if made.quantized is None:
        parity: dict[str, Parity] = {}
        for tensors in (stage.example, stage.others):
            compared = compare_each(_named(stage, run_module(stage.fused, tensors)), session.run(stage.feeds(tensors)))
            require_all("the ONNX graph", compared, MAX_RELATIVE["stage"][precision])
            parity = {n: max(p, parity.get(n, p), key=lambda q: q.relative) for n, p in compared.items()}
        return {"onnx": parity}
    # Typical inputs alone: on noise the activations of a calibrated net mean nothing.
    feeds = [made.examples[0], *made.examples[1:_CALIBRATION_COMPARED]]
    # Without its optimizations ONNX Runtime computes each pair in float, as the graph says: what its integer kernels
    # are held against.
    exact, simulated = GraphSession(exported), GraphSession(made.quantized.model, optimized=False)
    merged = [_concatenate([run.run(feed) for feed in feeds]) for run in (exact, simulated, session)]
    quantized, run = compare_each(merged[0], merged[1]), compare_each(merged[1], merged[2])
    for name, parity_of in quantized.items():
        if not parity_of.relative < 1.0:
            raise VerificationError(
                f"output {name} no longer resembles its float values in INT8 (relative {parity_of.relative:.2g})",
                "give more, and more typical, calibration examples, or fp16",
            )
    require_all("the INT8 graph", run, MAX_RELATIVE["stage"]["int8"])
    return {"quantized": quantized, "onnx": run}


def compare_engine(engine: Engine, staged: Path, stage: ModuleStage, progress: Progress) -> dict[str, Parity]:
    """How the engine's outputs for the example differ from the graph's in ONNX Runtime; none where it cannot run.

    Raises:
        VerificationError: by more than the precision's rounding.
        DeployError: the GPU of this machine should run it, and does not.
    """
    from repvgg_deploy.verification.engine import run_as_engine, run_where_possible

    dynamic = {place for places in stage.signature.dynamic.values() for place in places}
    if len(stage.example) > 1 or dynamic - {0}:
        progress.note("note: the engine was built but not run: it has several inputs, or inputs of several sizes")
        return {}
    images = stage.example[0].numpy()
    outputs = run_where_possible(engine, images, progress)
    if outputs is None:
        return {}
    parity = compare_each(run_as_engine(staged, images), outputs)
    require_all("the engine", parity, MAX_RELATIVE["engine"][engine.side.precision])
    return parity


def _concatenate(results: Sequence[Mapping[str, Array]]) -> dict[str, Array]:

    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def _named(stage: ModuleStage, outputs: Any) -> dict[str, Array]:
    values = (leaf.numpy() for _, leaf in leaves(outputs))
    return dict(zip(stage.signature.outputs, values, strict=True))
