"""What a failure on the GPU is told as."""

from __future__ import annotations

import pytest
from helpers.engine_graphs import rtx_backend
from helpers.engine_runs import FAULT, draw, on_device, parts
from helpers.simulated_engine import simulate, tensorrt_like

from repvgg_deploy.engine import log as messages
from repvgg_deploy.engine.runner import EngineRunner
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.gpus import FoundGpus, Gpu


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu("NVIDIA H200", "9.0", 141 << 30)
    monkeypatch.setattr(messages, "find_gpus", lambda: FoundGpus((gpu,)))
    return gpu


@pytest.mark.parametrize("call", ["synchronize", "copy_to_host", "synchronize_device"])
def test_a_failure_on_a_gpu_that_is_not_listed_names_it(call: str, h200: Gpu) -> None:
    loaded = simulate(rtx_backend())
    cuda, _ = parts(loaded)
    with EngineRunner(loaded) as runner:
        array = on_device(loaded, draw(2))
        cuda.fails = {call: FAULT}
        with pytest.raises(DeployError, match=rf"{FAULT}; .* does not support the {h200.name}") as raised:
            runner.run_on_device(array) if call == "synchronize_device" else runner.run(draw(3))
        assert "--engine tensorrt" in raised.value.hint
        cuda.fails = {}


@pytest.mark.usefixtures("h200")
def test_on_a_listed_gpu_a_failure_is_told_as_it_is() -> None:
    loaded = simulate(tensorrt_like())
    cuda, _ = parts(loaded)
    with EngineRunner(loaded) as runner:
        cuda.fails = {"synchronize": FAULT}
        with pytest.raises(DeployError) as raised:
            runner.run(draw(3))
        assert raised.value.message == FAULT
        cuda.fails = {}
