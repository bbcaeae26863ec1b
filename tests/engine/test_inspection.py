"""What the engine inspector's JSON says: the forms that NVIDIA's documentation and its releases show."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.engine_graphs import rtx_backend
from helpers.simulated_engine import simulate

from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.engine.inspection import convolution_precisions, parse_layers, read_layers
from repvgg_deploy.errors import DeployError


def layer(name: str, tensor: dict[str, str], metadata: str = "", kind: str = "CaskConvolution") -> dict[str, object]:
    inputs = [{"Name": "x", "Dimensions": [1, 16, 8, 8], **tensor}]
    return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": [], "TacticName": "t", "Metadata": metadata}


@pytest.mark.parametrize(
    ("tensor", "precision"),
    [
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, "int8"),
        ({"Format/Datatype": "Row major linear FP16 format"}, "fp16"),
        ({"Format/Datatype": "Half"}, "fp16"),
        ({"Format/Datatype": "BFloat16"}, "bf16"),
        ({"Format/Datatype": "Row major linear BF16"}, "bf16"),
        ({"Format/Datatype": "Float16"}, "fp16"),
        ({"Format/Datatype": "Row major linear FP32"}, "fp32"),
        ({"Format/Datatype": "Float"}, "fp32"),
        ({"Format": "NHWC8", "Datatype": "Half"}, "fp16"),
        ({"Format/Datatype": "N/A due to dynamic shapes"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_precision_of_a_layer_is_that_of_its_input(tensor: dict[str, str], precision: str) -> None:
    (parsed,) = parse_layers(json.dumps({"Layers": [layer("conv", tensor)]}))
    assert parsed.precision == precision


def test_a_fused_layer_names_the_nodes_of_the_graph() -> None:
    metadata = "[ONNX Layer: stages.0.0.conv]\x1e[ONNX Layer: stages.0.0.relu]"
    text = json.dumps({"Layers": [layer("fused", {"Format/Datatype": "Half"}, metadata)]})
    layers = parse_layers(text)
    assert layers[0].onnx_nodes == ("stages.0.0.conv", "stages.0.0.relu")
    found = convolution_precisions(layers, ("stages.0.0.conv", "stages.1.0.conv"))
    assert found == {"stages.0.0.conv": "fp16", "stages.1.0.conv": "not found"}


def test_an_engine_without_details_has_names_only() -> None:
    layers = parse_layers(json.dumps({"Layers": ["stages.0.0.conv + stages.0.0.relu"]}))
    assert layers[0].precision == "unknown"
    assert convolution_precisions(layers, ("stages.0.0.conv",)) == {"stages.0.0.conv": "unknown"}


@pytest.mark.parametrize("text", ["", "no json", "{}", '{"Layers": 3}', '{"Layers": [3]}'])
def test_text_that_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises(DeployError, match="cannot be parsed"):
        parse_layers(text)


def test_the_layers_of_a_dynamic_batch_are_those_of_the_best_one(backend: Backend) -> None:
    class Inspector:
        execution_context: Any = None

        def get_engine_information(self, layout: Any) -> str:
            assert layout.name == "JSON"
            known = self.execution_context is not None and self.execution_context.shape[:1] == (4,)
            text = "Half" if known else "N/A due to dynamic shapes"
            return json.dumps({"Layers": [{"Name": "conv", "Inputs": [{"Format/Datatype": text}]}]})

    loaded = simulate(backend)
    if backend.name == "tensorrt":
        backend.module.LayerInformationFormat = rtx_backend().module.LayerInformationFormat
    loaded.engine.create_engine_inspector = Inspector
    assert [layer.precision for layer in read_layers(loaded)] == ["fp16"]
