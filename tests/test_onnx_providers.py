"""ONNX Runtime runs on the provider that was asked for, or says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from engine_graphs import PIXELS, small_onnx

from repvgg_deploy.errors import DeployError
from repvgg_deploy.runners.onnx_runner import OnnxRunner


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_provider_that_is_not_there_is_an_error_not_the_cpu(provider: str, tmp_path: Path) -> None:
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(DeployError, match=f"has no {provider}") as raised:
        OnnxRunner(small_onnx(tmp_path), provider)
    assert "repvgg-deploy[gpu]" in raised.value.hint


def test_the_cpu_provider_names_itself(tmp_path: Path) -> None:
    runner = OnnxRunner(small_onnx(tmp_path))
    assert runner.backend == "onnxruntime-cpu"
    assert runner.run(np.zeros((2, 3, PIXELS, PIXELS), np.float32))["logits"].shape == (2, 10)
