"""`inspect` of graphs that other tools made."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.small_nets import make_spec, name_in_layout, randomize

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.graphs.training import to_training_onnx
from repvgg_deploy.nets.activations import parse_activation
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_request import ExportRequest
from repvgg_deploy.workflows.inspect import inspect_file


def test_all_parameters_of_a_foreign_graph_are_counted(net, tmp_path) -> None:
    """Whatever their names are, and where they are constants; a BN's statistics are none."""
    model = to_training_onnx(net, GraphOptions(32, 32)).to_proto()
    del model.metadata_props[:]
    names = {item.name: f"onnx::{number}" for number, item in enumerate(model.graph.initializer)}
    for item in model.graph.initializer:
        item.name = names[item.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    # What tools name well beside what they do not.
    model.graph.initializer[-1].name = model.graph.node[-1].input[2] = "fc.bias"
    onnx.save(model, tmp_path / "plain.onnx")
    moved = model.graph.initializer[0]
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [moved.name], value=moved))
    del model.graph.initializer[0]
    onnx.save(model, tmp_path / "constant.onnx")
    expected = sum(parameter.numel() for parameter in net.parameters())
    for name in ("plain.onnx", "constant.onnx"):
        assert inspect_file(tmp_path / name)["parameters"] == expected


def test_what_was_assumed_is_in_the_description(save) -> None:
    net = RepVGG(replace(make_spec(), activation=parse_activation("silu")))
    randomize(net)
    path = save({"state_dict": name_in_layout(net, "official"), "hyper_parameters": {"act": "silu", "img_size": 64}})
    assumed = inspect_file(path)["assumed"]
    said = "the checkpoint's configuration"
    assert assumed["activation"] == {"value": "silu", "source": said}
    assert assumed["size"] == {"value": [64, 64], "source": said}
    assert assumed["strides"] == {"value": [2, 2, 2, 2, 2], "source": "assumed"}
    assert assumed["mean"]["source"] == "assumed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.npz"])
def test_a_checkpoint_is_described_without_torch(
    name: str, state: dict[str, torch.Tensor], save: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "a.npz":
        np.savez(path, **{key: tensor.numpy() for key, tensor in state.items()})
    else:
        path = save(state, name)
    script = (
        "import sys; from pathlib import Path; from repvgg_deploy.workflows.inspect import inspect_file; "
        f"print(inspect_file(Path({str(path)!r}))['parameters']); sys.exit('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(printed) == inspect_file(path)["parameters"]


@pytest.mark.slow
def test_a_graph_is_described_without_torch(checkpoint_file: Path, tmp_path: Path) -> None:
    graph = export(ExportRequest(checkpoint_file, tmp_path, preprocessing=PreprocessingOptions((32, 32)))).onnx
    script = (
        "import sys; from pathlib import Path; from repvgg_deploy.workflows.inspect import inspect_file; "
        f"inspect_file(Path({str(graph)!r})); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
