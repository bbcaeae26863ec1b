"""Small real graphs for the engine's tests: every card with narrow layers, in every precision."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from repvgg_deploy.artifacts import Precision, Preprocessing, Provenance
from repvgg_deploy.engine.backends import Backend, Unavailable, import_backend
from repvgg_deploy.graphs.builder import GraphBuilder, write_graph
from repvgg_deploy.graphs.layers import FloatLayers, Layers, add_conv
from repvgg_deploy.graphs.metadata import make_metadata
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.nets.activations import Activation
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.spec import ArchSpec, BlockSpec

PIXELS = 32
CLASSES = 10
PREPROCESSING = Preprocessing(height=PIXELS, width=PIXELS, resize=PIXELS)


def rtx_backend() -> Backend:
    """TensorRT-RTX, which builds without a GPU; the test is skipped where it is not installed."""
    found = import_backend("tensorrt-rtx")
    if isinstance(found, Unavailable):
        pytest.skip(found.reason)
    return found


def narrow_spec(card: str) -> ArchSpec:
    """The deploy form of a card with an eighth of its channels, all its blocks, groups and squeeze-excites."""
    spec = find_card(card).spec(classes=CLASSES).fused()

    def narrow(channels: int) -> int:
        return channels if channels == 3 else max(16, channels // 8 // 16 * 16)

    def narrow_block(block: BlockSpec) -> BlockSpec:
        se = block.squeeze_excite
        return replace(
            block,
            in_channels=narrow(block.in_channels),
            out_channels=narrow(block.out_channels),
            squeeze_excite=replace(se, channels=max(4, se.channels // 8)) if se is not None else None,
        )

    return replace(spec, stages=tuple(tuple(narrow_block(block) for block in stage) for stage in spec.stages))


def make_net(spec: ArchSpec, seed: int = 0) -> RepVGG:
    """A net with weights that keep the size of the activations (He), so that the outputs say something."""
    torch.manual_seed(seed)
    net = RepVGG(spec).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net


@dataclass
class QuantizedLayers:
    """Explicit Q/DQ by the rules of TensorRT: activations per tensor, weights per output channel, biases in float."""

    floats: FloatLayers = field(default_factory=FloatLayers)
    scale: float = 0.05

    @property
    def dtype(self) -> np.dtype[np.float32]:
        return np.dtype(np.float32)

    def _activation(self, g: GraphBuilder, name: str, x: str) -> str:
        scale = g.weight(f"{name}.scale", np.array(self.scale, np.float32))
        zero = g.weight(f"{name}.zero", np.array(0, np.int8))
        x = g.add("QuantizeLinear", [x, scale, zero], f"{name}.q")
        return g.add("DequantizeLinear", [x, scale, zero], f"{name}.dq")

    def _weight(self, g: GraphBuilder, name: str, weight: torch.Tensor) -> str:
        values = weight.detach().numpy()
        scales = (np.abs(values).reshape(len(values), -1).max(1) / 127).astype(np.float32)
        steps = np.rint(values / scales.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
        inputs = [g.weight(f"{name}.int8", steps), g.weight(f"{name}.scale", scales)]
        inputs.append(g.weight(f"{name}.zero", np.zeros(len(values), np.int8)))
        return g.add("DequantizeLinear", inputs, f"{name}.dq", axis=0)

    def conv(self, g: GraphBuilder, name: str, conv: nn.Conv2d, x: str) -> str:
        x = self._activation(g, f"{name}.input", x)
        weight = self._weight(g, f"{name}.weight", conv.weight)
        return add_conv(g, name, conv, [x, weight, self.floats.value(g, f"{name}.bias", conv.bias)])

    def activate(self, g: GraphBuilder, name: str, activation: Activation, x: str) -> str:
        return self.floats.activate(g, name, activation, x)

    def read_map(self, g: GraphBuilder, reader: str | None, x: str) -> str:
        return self.floats.read_map(g, reader, x)

    def pool(self, g: GraphBuilder, name: str, x: str) -> str:
        return g.add("GlobalAveragePool", [self._activation(g, f"{name}.input", x)], name)

    def linear(self, g: GraphBuilder, name: str, linear: nn.Linear, x: str) -> str:
        return self.floats.linear(g, name, linear, x)


def layers_for(precision: Precision) -> Layers:
    if precision is Precision.INT8:
        return QuantizedLayers()
    return FloatLayers(np.dtype(np.float16 if precision is Precision.FP16 else np.float32))


def provenance(precision: Precision, arch: str = "RepVGG-A0") -> Provenance:
    return Provenance(
        "0" * 64, arch, "official", "deploy", precision, PREPROCESSING, None, {"torch": torch.__version__}
    )


def write_onnx(
    folder: Path,
    net: RepVGG,
    precision: Precision = Precision.FP32,
    options: GraphOptions | None = None,
    declared: Precision | None = None,
    name: str = "net",
) -> Path:
    """`<name>.<precision>.onnx` of `net`; `declared` is the precision that its metadata says."""
    path = folder / f"{name}.{precision}.onnx"
    options = options or GraphOptions(PIXELS, PIXELS)
    graph = to_onnx(net, layers_for(precision), options, make_metadata(provenance(declared or precision)))
    write_graph(graph, path)
    return path


def small_onnx(folder: Path, precision: Precision = Precision.FP32, **options: object) -> Path:
    """The graph of a narrow A0."""
    return write_onnx(folder, make_net(narrow_spec("A0")), precision, **options)
