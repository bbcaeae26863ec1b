"""The training form as an ONNX graph: every branch with its BN, as frameworks export a net that was not fused.

It is what the fused graph is timed against; nobody deploys it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from onnx import TensorProto, helper
from torch import Tensor, nn

import repvgg_deploy
from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import GraphBuilder, OnnxGraph, make_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, add_hidden
from repvgg_deploy.nets.activations import Activation
from repvgg_deploy.nets.repvgg import ConvBranch, FusedBlock, RepVGG, SqueezeExciteBlock, TrainingBlock
from repvgg_deploy.nets.spec import branch_name


def to_training_onnx(net: RepVGG, options: GraphOptions) -> OnnxGraph:
    """The checked ONNX graph of a net in the form that it has, in float32: no branch is fused and no BN folded.

    Input `images` (N, C, H, W), output `logits` (N, classes). Of `options` the size, the batch and the opset count.

    Raises:
        GraphError: the options ask for another input or output than that.
    """
    if options.uint8_input is not None or options.softmax or options.topk is not None:
        raise GraphError("the training form takes normalized images and gives logits", "leave the options out")
    g = GraphBuilder()
    layers = FloatLayers(np.dtype(np.float32))
    x = "images"
    for name, block in net.named_blocks():
        x = _add_block(g, name, block, net.spec.activation, layers, x)
    x = g.add("Flatten", [layers.pool(g, "pool", x)], "features")
    x = add_hidden(g, net, layers, x)
    if net.has_classifier:
        layers.linear(g, "classifier", net.classifier, x)
    (output,) = net.spec.output_names
    g.nodes[-1].output[0] = output
    batch: int | str = options.batch or "batch"
    shape = [batch, net.spec.in_channels, options.height, options.width]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, net.spec.classes or net.spec.features])]
    metadata = {"repvgg_deploy.form": net.spec.form, "repvgg_deploy.precision": "fp32"}
    return make_graph(g, inputs, outputs, options.opset, metadata, ("repvgg-deploy", repvgg_deploy.__version__))


def _add_block(
    g: GraphBuilder, name: str, block: nn.Module, activation: Activation, layers: FloatLayers, x: str
) -> str:
    if isinstance(block, FusedBlock):
        x = layers.conv(g, f"{name}.conv", block.conv, x)
        se_before, se_after = block.se_before, block.se_after
    else:
        block = cast(TrainingBlock, block)
        x = _add_branches(g, name, block, layers, x)
        if block.bn is not None:
            x = add_batch_norm(g, f"{name}.bn", block.bn, layers, x)
        se_before, se_after = block.se_before, block.se_after
    x = _add_squeeze_excite(g, f"{name}.se_before", se_before, layers, x)
    x = layers.activate(g, name, activation, x)
    return _add_squeeze_excite(g, f"{name}.se_after", se_after, layers, x)


def _add_branches(g: GraphBuilder, name: str, block: TrainingBlock, layers: FloatLayers, x: str) -> str:
    outputs: list[str] = []
    for spec in block.spec.branches:
        path = f"{name}.{branch_name(spec.kernel)}"
        branch = cast(ConvBranch, block.get_submodule(branch_name(spec.kernel)))
        y = x
        if isinstance(branch.conv, nn.Conv2d):
            y = add_bare_conv(g, f"{path}.conv", branch.conv, layers, y)
        if isinstance(branch.bn, nn.BatchNorm2d):
            y = add_batch_norm(g, f"{path}.bn", branch.bn, layers, y)
        outputs.append(y)
    total = outputs[0]
    for number, branch_output in enumerate(outputs[1:], 1):
        total = g.add("Add", [total, branch_output], f"{name}.sum{number}")
    return total


def add_bare_conv(g: GraphBuilder, name: str, conv: nn.Conv2d, layers: FloatLayers, x: str) -> str:
    """A Conv node without a bias."""
    weight = layers.value(g, f"{name}.weight", conv.weight)
    geometry = {
        "kernel_shape": list(conv.kernel_size),
        "strides": list(conv.stride),
        "pads": [int(p) for p in cast(Sequence[int], conv.padding)] * 2,
        "group": conv.groups,
    }
    return g.add("Conv", [x, weight], name, **geometry)


def add_batch_norm(g: GraphBuilder, name: str, bn: nn.BatchNorm2d, layers: FloatLayers, x: str) -> str:
    """A BatchNormalization node with the running statistics of `bn`."""
    parts = {"scale": bn.weight, "shift": bn.bias, "mean": bn.running_mean, "var": bn.running_var}
    weights = [layers.value(g, f"{name}.{part}", cast(Tensor, tensor)) for part, tensor in parts.items()]
    return g.add("BatchNormalization", [x, *weights], name, epsilon=float(bn.eps))


def _add_squeeze_excite(g: GraphBuilder, name: str, se: nn.Module, layers: FloatLayers, x: str) -> str:
    if not isinstance(se, SqueezeExciteBlock):
        return x
    s = g.add("GlobalAveragePool", [x], f"{name}.squeeze")
    s = g.add("Relu", [layers.conv(g, f"{name}.down", se.down, s)], f"{name}.relu")
    s = g.add("Sigmoid", [layers.conv(g, f"{name}.up", se.up, s)], f"{name}.gate")
    return g.add("Mul", [x, s], f"{name}.scaled")
