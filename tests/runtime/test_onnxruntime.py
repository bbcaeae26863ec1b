"""ONNX Runtime runs on the provider that was asked for, or says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from helpers.engine_graphs import PIXELS, small_onnx

from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.runtime import onnxruntime as onnx_runner
from repvgg_deploy.runtime.onnxruntime import OnnxRunner


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_provider_that_is_not_there_is_an_error_not_the_cpu(provider: str, tmp_path: Path) -> None:
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(DeployError, match=f"has no {provider}") as raised:
        OnnxRunner(small_onnx(tmp_path), provider)
    assert "onnxruntime-gpu" in raised.value.hint
    assert "would have run on CPUExecutionProvider" in raised.value.message


def test_a_provider_that_takes_nothing_of_the_graph_is_named_not_the_graph(tmp_path: Path) -> None:
    # What CUDA's provider is where its libraries are missing: listed, and left out of the session.
    provider = "AzureExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {provider}")
    with pytest.raises(DeployError, match=f"{provider} of ONNX Runtime does not load here") as raised:
        OnnxRunner(small_onnx(tmp_path), provider)
    assert not isinstance(raised.value, GraphError)
    assert "install what that provider needs" in raised.value.hint


class Runtime:
    """An ONNX Runtime with the providers of a GPU, of which the second does not load."""

    __version__ = "1.99"
    preloaded = 0
    loads: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider")
    given: tuple[object, ...] = ()

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def SessionOptions(self) -> onnxruntime.SessionOptions:
        return onnxruntime.SessionOptions()

    def preload_dlls(self) -> None:
        print("Failed to load libcudnn.so.9")
        self.preloaded += 1

    def InferenceSession(self, model: str, options: object, providers: list[object], enable_fallback: int) -> object:
        del options, enable_fallback
        self.given = (*providers, self.preloaded)
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: list(self.loads)
        return session


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    monkeypatch.setattr(onnx_runner, "import_onnxruntime", lambda: fake)
    return fake


def test_what_tensorrt_falls_back_to_is_named(tmp_path: Path, runtime: Runtime) -> None:
    del runtime
    said = r"TensorrtExecutionProvider .* would have run on CUDAExecutionProvider"
    with pytest.raises(DeployError, match=said) as raised:
        OnnxRunner(small_onnx(tmp_path), "TensorrtExecutionProvider")
    assert "CPU" not in raised.value.message


def test_fp32_on_cuda_is_without_tf32(tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    runner = OnnxRunner(small_onnx(tmp_path), "CUDAExecutionProvider")
    # The libraries of pip's packages were loaded before the session, without a word on standard output.
    assert runtime.given == (("CUDAExecutionProvider", {"use_tf32": "0"}), 1)
    assert capsys.readouterr().out == ""
    assert runner.backend == "onnxruntime-cuda"


def test_the_cpu_needs_no_cuda_libraries(tmp_path: Path, runtime: Runtime) -> None:
    runtime.loads = ("CPUExecutionProvider",)
    OnnxRunner(small_onnx(tmp_path))
    assert runtime.given == ("CPUExecutionProvider", 0)


def test_the_cpu_provider_names_itself(tmp_path: Path) -> None:
    runner = OnnxRunner(small_onnx(tmp_path))
    assert runner.backend == "onnxruntime-cpu"
    assert runner.run(np.zeros((2, 3, PIXELS, PIXELS), np.float32))["logits"].shape == (2, 10)
