"""The example of a segmentation net: INT8 finds what fp32 finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime import InferenceSession
from PIL import Image

from repvgg_deploy import DeployError, fuse, prepare_qat
from repvgg_deploy.quantization.qat_scales import observe_scales

EXAMPLE = Path(__file__).parents[2] / "examples" / "segmentation.py"


@pytest.fixture(scope="module")
def example() -> Any:
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed")
    spec = importlib.util.spec_from_file_location("segmentation", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
def test_int8_segments_as_well_as_fp32(example, tmp_path: Path) -> None:
    scores = example.main(tmp_path, steps=400)
    assert scores["fp32"] > 60
    assert abs(scores["int8"] - scores["fp32"]) <= 0.5
    # Three columns of four pictures of 64 pixels with two of border on each side, twice enlarged.
    with Image.open(tmp_path / "segmentation.png") as picture:
        assert picture.size == (2 * 3 * 68, 2 * 4 * 68)


@pytest.mark.exhaustive
def test_a_net_trained_for_int8_in_its_own_loop_is_exported_with_what_it_learned(example, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = example.train(example.PyramidNet(8), 10)
    batches = list(example.draw(32, seed=3)[0].split(16))
    trained, scales = example.train_for_int8(net, batches, 5)
    start = observe_scales(net, batches)
    assert all(layer.input != start.layers[name].input for name, layer in scales.layers.items())
    graph = tmp_path / "net.onnx"
    options = {"precision": "int8", "calibration": batches, "recipe": "fast"}
    example.export_module(trained, batches[0][:1], graph, scales=scales, **options)
    constants = [numpy_helper.to_array(item) for item in onnx.load(graph).graph.initializer]
    written = [values for values in constants if values.dtype == np.int8 and values.ndim == 4]
    deployed = fuse(trained)
    for integers, (name, layer) in zip(written, scales.layers.items(), strict=True):
        steps = deployed.get_submodule(name).conv.weight.detach() / layer.weight[:, None, None, None]
        # Half an integer is the most that rounding changes, and the limit of pairs where two neighbours are large.
        assert np.mean(np.abs(integers - steps.numpy()) < 0.51) > 0.98, name
    prepared = prepare_qat(trained, scales).eval()
    with torch.no_grad():
        wanted = prepared(batches[0]).numpy()
    given = InferenceSession(str(graph)).run(None, {"images": batches[0].numpy()})[0]
    assert np.linalg.norm(given - wanted) < 0.05 * np.linalg.norm(wanted)
    with pytest.raises(DeployError, match="scales are for INT8"):
        example.export_module(trained, batches[0][:1], tmp_path / "other.onnx", scales=scales)
