"""What the engine inspector's JSON says: the forms that NVIDIA's documentation and its releases show."""

from __future__ import annotations

import json

import pytest

from repvgg_deploy.engine.inspection import convolution_precisions, parse_layers
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
