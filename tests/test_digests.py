"""Files that a change of the code's structure must leave as they are, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.graphs.training import to_training_onnx
from repvgg_deploy.nets.repvgg import RepVGG

# Made on 2026-11-25, before the files of the package were put into floors. The algebra is float64 and rounded once, so
# that they are the same on every CPU; the metadata, which name versions, are left out.
DIGESTS = {
    "fp32": "8dd65c139a56021c71cfffcb85db877424ce0d596f59962683dde08075a44ae1",
    "fp16": "71e91318fd71b7cdd37114d5d932bcb6d087744094e155f18945dde388540329",
    "uint8 input, top 5": "107dcae9acebc51414c1b2d7c562b11f876e98660ed2c72367f0ec7c49f3f726",
    "training": "63647cae2562ad3b7577a94efd0783d541f108ff3298df310ea6436912d0e7d0",
}


@pytest.mark.parametrize("kind", DIGESTS)
def test_the_graphs_of_the_demo_model_are_what_they_were(kind: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(data_folder("models") / "demo.safetensors")
    net = build(checkpoint)
    options = GraphOptions(64, 64)
    if kind == "training":
        graph = to_training_onnx(net, options)
    else:
        if kind == "uint8 input, top 5":
            from repvgg_deploy.artifacts import Preprocessing

            options = GraphOptions(64, 64, uint8_input=Preprocessing(64, 64, 64), softmax=True, topk=5)
        layers = FloatLayers(np.dtype(np.float16 if kind == "fp16" else np.float32))
        graph = to_onnx(cast(RepVGG, fuse(net, torch.float32)), layers, options, {})
    write_graph(graph, tmp_path / "graph.onnx")
    assert hashlib.sha256((tmp_path / "graph.onnx").read_bytes()).hexdigest() == DIGESTS[kind]
