"""Chains of convolutions in any ONNX graph: found, and quantized by the passes that a RepVGG is quantized by.

A chain is convolution, ReLU, convolution, … in which nothing else reads what is between. Inside it channels are
equalized; each layer makes up for the error of those before, also of those in the chains before.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.repvgg import FusedBlock
from repvgg_deploy.quantization.bias_headroom import make_room
from repvgg_deploy.quantization.dead_inputs import remove_dead_columns
from repvgg_deploy.quantization.equalize import equalize_pairs
from repvgg_deploy.quantization.layer_inputs import Streams
from repvgg_deploy.quantization.pair_sums import count_taps
from repvgg_deploy.quantization.points import BATCH
from repvgg_deploy.quantization.qat import LayerScales
from repvgg_deploy.quantization.recipe import Recipe
from repvgg_deploy.quantization.reconstruct import advance, choose_scale, reconstruct_block
from repvgg_deploy.quantization.rounding import quantize_activations, round_weights
from repvgg_deploy.quantization.state import LayerIntegers, Reconstruction
from repvgg_deploy.quantization.statistics import PointObserver, PointStatistics


@dataclass(frozen=True)
class ConvNode:
    """A convolution of a graph whose weights are constants.

    Attributes:
        name: of its node.
        weight, bias: names of the constants; no bias is None.
        x: the tensor that it reads.
        y: the tensor that it makes; that of its ReLU if it has one.
        relu: whether a ReLU is all that reads the convolution itself.
        groups, stride, padding, dilation: as torch has them.
    """

    name: str
    weight: str
    bias: str | None
    x: str
    y: str
    relu: bool
    groups: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True)
class Chain:
    """Convolutions of which each is all that reads the one before, in the order of execution."""

    convs: tuple[ConvNode, ...]

    @property
    def x(self) -> str:
        """The tensor that the chain reads."""
        return self.convs[0].x

    @property
    def y(self) -> str:
        """The tensor that it makes."""
        return self.convs[-1].y

    @property
    def has_output_scale(self) -> bool:
        """Whether its output is quantized too; what an activation other than ReLU reads is left exact."""
        return self.convs[-1].relu


@dataclass(frozen=True)
class QuantizedChain:
    """The integers of a chain's layers in their order, the scale of its output (None: not quantized), and how near.

    `output_db` is the signal-to-noise ratio of its output on the calibration examples, in dB.
    """

    chain: Chain
    layers: tuple[LayerIntegers, ...]
    output_scale: float | None
    output_db: float


class GraphReaders:
    """Which nodes read and make each tensor of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.outputs = {item.name for item in graph.output}
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def only_reader(self, tensor: str) -> onnx.NodeProto | None:
        """The one node that reads `tensor`; None if there are several, or where it is an output."""
        found = self.readers.get(tensor, [])
        return found[0] if len(found) == 1 and tensor not in self.outputs else None


def find_chains(model: onnx.ModelProto, weights: Collection[str] | None) -> tuple[Chain, ...]:
    """The chains of the convolutions with these weights (None: of all), in an order in which each may be quantized.

    Convolutions that are not two-dimensional, whose weights are computed or whose padding is not symmetric are left
    out.
    """
    graph = model.graph
    links = GraphReaders(graph)
    constants = {item.name for item in graph.initializer}
    convs = [conv for node in graph.node if (conv := _read_conv(node, links, constants, weights)) is not None]
    by_name = {conv.name: conv for conv in convs}
    following: dict[str, ConvNode] = {}
    for conv in convs:
        reader = links.only_reader(conv.y) if conv.relu else None
        if reader is not None and reader.name in by_name and reader.input[0] == conv.y:
            following[conv.name] = by_name[reader.name]
    inner = {conv.name for conv in following.values()}
    chains = []
    for conv in convs:
        if conv.name in inner:
            continue
        members = [conv]
        while members[-1].name in following:
            members.append(following[members[-1].name])
        chains.append(Chain(tuple(members)))
    return tuple(chains)


def _read_conv(
    node: onnx.NodeProto, links: GraphReaders, constants: Collection[str], weights: Collection[str] | None
) -> ConvNode | None:
    if (
        node.op_type != "Conv"
        or node.input[1] not in constants
        or (weights is not None and node.input[1] not in weights)
    ):
        return None
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    pads = list(attributes.get("pads", (0, 0, 0, 0)))
    # ONNX pads each side for itself; torch's convolutions, in which the passes compute, pad both alike.
    plain = attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and len(pads) == 4 and pads[:2] == pads[2:]
    if not plain or (bias is not None and bias not in constants):
        return None
    reader = links.only_reader(node.output[0])
    relu = reader if reader is not None and reader.op_type == "Relu" else None
    return ConvNode(
        name=node.name,
        weight=node.input[1],
        bias=bias,
        x=node.input[0],
        y=node.output[0] if relu is None else relu.output[0],
        relu=relu is not None,
        groups=int(attributes.get("group", 1)),
        stride=_pair(attributes.get("strides", (1, 1))),
        padding=_pair(pads[:2]),
        dilation=_pair(attributes.get("dilations", (1, 1))),
    )


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def to_blocks(chain: Chain, constants: Mapping[str, onnx.TensorProto]) -> list[FusedBlock]:
    """The convolutions of `chain` as torch modules, each with a bias."""
    return [_to_block(conv, constants) for conv in chain.convs]


def _to_block(node: ConvNode, constants: Mapping[str, onnx.TensorProto]) -> FusedBlock:
    weight = torch.from_numpy(numpy_helper.to_array(constants[node.weight]).copy())
    zeros = torch.zeros(len(weight))
    bias = zeros if node.bias is None else torch.from_numpy(numpy_helper.to_array(constants[node.bias]).copy())
    channels, size = weight.shape[1] * node.groups, _pair(weight.shape[2:])
    conv = nn.Conv2d(channels, len(weight), size, node.stride, node.padding, node.dilation, node.groups)
    conv.weight, conv.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    act = nn.ReLU() if node.relu else nn.Identity()
    return FusedBlock(conv, nn.Identity(), act, nn.Identity()).eval()


@torch.no_grad()
def quantize_chain(
    chain: Chain, blocks: Sequence[FusedBlock], streams: Streams, recipe: Recipe, number: int, scale: float | None
) -> QuantizedChain:
    """The integers of `chain`, whose layers are `blocks`; changes `blocks`, and moves `streams` past it.

    Args:
        chain: of a graph.
        blocks: its layers, of `to_blocks`.
        streams: the chain's inputs for some examples, in the float graph and in the graph quantized so far.
        recipe: its `dead_inputs`, `equalize`, `scales` and `rounding` are used.
        number: of layers in the chains before, which chooses the sampled pixels.
        scale: of the chain's input, where another chain has given it one.

    Raises:
        DeployError: an activation is not finite.
    """
    points = _statistics(chain, blocks, streams.exact)
    if recipe.dead_inputs is not None:
        for block, point in zip(blocks, points, strict=True):
            remove_dead_columns(block.conv, point, recipe.dead_inputs)
    if recipe.equalize is not None:
        pairs = [(block, reader.conv) for block, reader in pairwise(blocks)]
        equalize_pairs(pairs, [torch.as_tensor(point.usual) for point in points[1:]], recipe.equalize)
    layers: dict[str, LayerIntegers] = {}
    for index, (conv, block) in enumerate(zip(chain.convs, blocks, strict=True)):
        known = scale if index == 0 else None
        layers[conv.name] = reconstruct_block(block, streams, recipe, number + index, known)
    return _finish(chain, layers, streams, recipe)


@torch.no_grad()
def round_chain(
    chain: Chain,
    blocks: Sequence[FusedBlock],
    streams: Streams,
    recipe: Recipe,
    learned: Mapping[str, LayerScales],
    scale: float | None,
) -> QuantizedChain:
    """The integers of `chain` that training learned: its weights over their scales, rounded; nothing else changes.

    The arguments are those of `quantize_chain`, and `learned` are the scales by the names of the weights. Only the
    scale of the chain's output is chosen by `recipe`.

    Raises:
        DeployError: a layer has no scales, or scales of another width.
    """
    layers: dict[str, LayerIntegers] = {}
    for index, (conv, block) in enumerate(zip(chain.convs, blocks, strict=True)):
        found = learned.get(conv.weight)
        if found is None or len(found.weight) != len(block.conv.weight):
            raise DeployError(
                f"there are no scales for {conv.weight}, or scales of another width", "give what convert_qat() returned"
            )
        known = scale if index == 0 and scale is not None else found.input
        rows = round_weights(block.conv.weight.flatten(1), found.weight, count_taps(block.conv.weight))
        integers = rows.reshape(block.conv.weight.shape).to(torch.int8)
        assert block.conv.bias is not None
        layers[conv.name] = LayerIntegers(integers, found.weight, block.conv.bias.clone(), known)
        streams.rounded = quantize_activations(streams.rounded, known)
        advance(streams, block, layers[conv.name])
    return _finish(chain, layers, streams, recipe)


def _finish(chain: Chain, layers: dict[str, LayerIntegers], streams: Streams, recipe: Recipe) -> QuantizedChain:
    output_scale = None
    if chain.has_output_scale:
        output_scale = choose_scale(streams, None, recipe)
        streams.rounded = quantize_activations(streams.rounded, output_scale)
    roomy = make_room(Reconstruction(layers, None)).layers
    return QuantizedChain(chain, tuple(roomy.values()), output_scale, _ratio_db(streams))


def _statistics(chain: Chain, blocks: Sequence[FusedBlock], x: Tensor) -> list[PointStatistics]:
    """The statistics of each layer's input."""
    observers = [PointObserver() for _ in blocks]
    for batch in torch.split(x, BATCH):
        for conv, block, observer in zip(chain.convs, blocks, observers, strict=True):
            if not observer.add(batch):
                raise DeployError(
                    f"the activations before {conv.name} are not finite", "look at the calibration examples"
                )
            batch = block(batch)
    return [observer.result() for observer in observers]


def _ratio_db(streams: Streams) -> float:
    noise = float((streams.rounded - streams.exact).double().square().sum())
    signal = float(streams.exact.double().square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
