"""INT8 of a whole network: its chains quantized one after another, on what each of them reads in the graph so far."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from repvgg_deploy.artifacts import Array
from repvgg_deploy.errors import DeployError
from repvgg_deploy.progress import Progress
from repvgg_deploy.quantization.chain_graph import input_scale, insert_chains, prune
from repvgg_deploy.quantization.chains import QuantizedChain, find_chains, quantize_chain, round_chain, to_blocks
from repvgg_deploy.quantization.layer_inputs import MEMORY_BYTES, Streams
from repvgg_deploy.quantization.qat import LayerScales
from repvgg_deploy.quantization.recipe import Recipe
from repvgg_deploy.runtime.session import GraphSession
from repvgg_deploy.torch_precision import float32

Feeds = Mapping[str, Array]
"""The inputs of a graph by name."""


@dataclass(frozen=True)
class QuantizedGraph:
    """A graph whose chains are INT8, and what it was calibrated on."""

    model: onnx.ModelProto
    chains: tuple[QuantizedChain, ...]
    examples: int
    examples_sha256: str


@float32(deterministic=True)
def quantize_graph(
    model: onnx.ModelProto,
    weights: Collection[str] | None,
    examples: Sequence[Feeds],
    recipe: Recipe,
    progress: Progress,
    learned: Mapping[str, LayerScales] | None = None,
) -> QuantizedGraph:
    """`model`, a float32 graph, with INT8 chains of the convolutions that have these weights (None: of all).

    With `learned`, scales by the names of the weights, the integers are those that were trained for.

    Raises:
        DeployError: there is no such convolution, no example, or an activation is not finite.
    """
    if not examples:
        raise DeployError("there are no calibration examples", "give a few hundred typical inputs as `calibration`")
    chains = find_chains(model, weights)
    if not chains:
        raise DeployError("the graph has no convolution to quantize", "export with fp32 or fp16")
    constants = {item.name: item for item in model.graph.initializer}
    done: list[QuantizedChain] = []
    number, total = 0, sum(len(chain.convs) for chain in chains)
    for chain in chains:
        progress.step("quantizing", number, total)
        exact = _capture(model, chain.x, examples, recipe)
        rounded = _capture(insert_chains(model, done), chain.x, examples, recipe) if done else exact
        scale = input_scale(chain.x, done)
        blocks = to_blocks(chain, constants)
        streams = Streams(exact, rounded)
        if learned is None:
            done.append(quantize_chain(chain, blocks, streams, recipe, number, scale))
        else:
            done.append(round_chain(chain, blocks, streams, recipe, learned, scale))
        number += len(chain.convs)
    progress.step("quantizing", total, total)
    return QuantizedGraph(insert_chains(model, done), tuple(done), count_examples(examples), hash_examples(examples))


def _capture(model: onnx.ModelProto, tensor: str, examples: Sequence[Feeds], recipe: Recipe) -> Tensor:
    """The values of a tensor on examples evenly spaced over all, as many as the recipe keeps and the memory allows."""
    if tensor in {item.name for item in model.graph.input}:
        batches = [example[tensor] for example in examples]
    else:
        session = GraphSession(prune(model, tensor))
        wanted = [{name: example[name] for name in session.inputs} for example in examples]
        first = session.run(wanted[0])[tensor]
        # Both streams of the chain are in memory at once.
        most = max(1, MEMORY_BYTES // (2 * first.nbytes))
        batches = [session.run(example)[tensor] for example in wanted[:: -(-len(wanted) // most)]]
    stacked = np.concatenate(batches)
    step = max(1, -(-len(stacked) // recipe.rounding.images))
    return torch.from_numpy(np.ascontiguousarray(stacked[::step])).contiguous(memory_format=torch.channels_last)


def take_examples(
    calibration: Iterable[Tensor | Sequence[Tensor]], names: Sequence[str], count: int
) -> tuple[Feeds, ...]:
    """At most `count` of the examples, as the graph takes them.

    Raises:
        DeployError: one of them does not have the inputs `names`.
    """
    taken: list[Feeds] = []
    number = 0
    for given in calibration:
        tensors = (given,) if isinstance(given, Tensor) else tuple(given)
        if len(tensors) != len(names):
            raise DeployError(
                f"a calibration example has {len(tensors)} inputs, but the module takes {len(names)}",
                "each is a tensor or a tuple of tensors, with the batch in front",
            )
        taken.append({name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)})
        number += len(tensors[0])
        if number >= count:
            break
    return tuple(taken)


def count_examples(examples: Sequence[Feeds]) -> int:
    """How many there are, over all batches."""
    return sum(len(next(iter(example.values()))) for example in examples)


def hash_examples(examples: Sequence[Feeds]) -> str:
    """The sha256 of all values."""
    digest = hashlib.sha256()
    for example in examples:
        for name in sorted(example):
            digest.update(np.ascontiguousarray(example[name]).tobytes())
    return digest.hexdigest()
