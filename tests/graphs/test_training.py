"""The training form as ONNX: every branch is there, and ONNX Runtime gives the net's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_nets import BARE, logits_of, make_net, relative

from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.graphs.training import to_training_onnx
from repvgg_deploy.nets.spec import SqueezeExcite
from repvgg_deploy.runtime.onnxruntime import OnnxRunner

NETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"groups": 2},
    "norm after the sum": {"norm_after_sum": True, "branches": BARE},
    "SE before": {"squeeze_excite": SqueezeExcite(4)},
    "SE after": {"squeeze_excite": SqueezeExcite(4, "after")},
}


@pytest.mark.parametrize("spec", NETS.values(), ids=NETS.keys())
def test_onnx_runtime_gives_the_training_forms_logits(
    spec: dict[str, Any], images: torch.Tensor, tmp_path: Path
) -> None:
    net = make_net(**spec)
    path = tmp_path / "train.onnx"
    write_graph(to_training_onnx(net, GraphOptions(32, 32)), path)
    logits = OnnxRunner(path).run(images.numpy())["logits"]
    assert relative(torch.from_numpy(logits), logits_of(net, images)) < 5e-6


def test_no_branch_is_fused_and_no_norm_folded() -> None:
    net = make_net()
    blocks = net.spec.blocks
    ops = to_training_onnx(net, GraphOptions(32, 32)).op_histogram()
    branches = sum(len(block.branches) for block in blocks)
    identities = sum(block.can_skip for block in blocks)
    assert ops["BatchNormalization"] == branches
    assert ops["Conv"] == branches - identities
    assert ops["Add"] == branches - len(blocks)


def test_a_fixed_batch_is_declared() -> None:
    graph = to_training_onnx(make_net(), GraphOptions(32, 32, batch=3))
    assert graph.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_another_input_or_output_is_refused() -> None:
    with pytest.raises(GraphError, match="training form"):
        to_training_onnx(make_net(), GraphOptions(32, 32, softmax=True))
