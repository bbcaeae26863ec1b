"""Execution contexts of a simulated engine: kernels compiled once, addresses, and what profilers see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.engine_graphs import rtx_backend
from helpers.engine_runs import draw, expected, on_device, parts
from helpers.simulated_engine import simulate, tensorrt_like

from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.engine.runner import EngineRunner
from repvgg_deploy.errors import DeployError


def test_tensorrt_rtx_compiles_the_kernels_of_a_shape_before_they_are_captured() -> None:
    loaded = simulate(rtx_backend())
    _, engine = parts(loaded)
    with EngineRunner(loaded) as runner:
        runner.run(draw(3))
        runner.run_on_device(on_device(loaded, draw(2)))
    assert engine.eager == [True] * 3


def test_tensorrt_is_asked_for_nothing_that_only_tensorrt_rtx_has() -> None:
    loaded = simulate(tensorrt_like())
    _, engine = parts(loaded)
    with EngineRunner(loaded) as runner:
        runner.run(draw(3))
    # The simulated engine takes no configuration here.
    assert engine.eager == [False] * 2


def test_the_kernels_of_a_batch_are_compiled_once_for_all_contexts_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []
    for _ in range(2):
        loaded = simulate(rtx_backend())
        _, engine = parts(loaded)
        with EngineRunner(loaded, streams=2) as runner:
            runner.run(draw(8 + 8 + 3))
            runner.run_on_device(on_device(loaded, draw(3)))
        compiled.append(engine.compiled)
    assert compiled == [[8, 3], []]
    (cache,) = tmp_path.rglob("*.runtime")
    # One that does not fit is replaced.
    cache.write_bytes(b"of another driver")
    loaded = simulate(rtx_backend())
    with EngineRunner(loaded) as runner:
        runner.run(draw(2))
    assert cache.read_bytes() == b"kernels of \x02"


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repvgg-deploy").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with EngineRunner(simulate(rtx_backend())) as runner:
        np.testing.assert_array_equal(runner.run(draw(2))["logits"], expected(draw(2)))


def test_contexts_name_no_layers_to_profilers(backend: Backend) -> None:
    with EngineRunner(simulate(backend)) as runner:
        assert runner.streams[0].context.nvtx_verbosity.name == "NONE"


def test_an_address_that_the_library_refuses_is_an_error(backend: Backend) -> None:
    loaded = simulate(backend)
    _, engine = parts(loaded)
    engine.refuses_addresses_of = ("logits",)
    with pytest.raises(DeployError, match=r"giving simulated\.plan the memory of logits failed"):
        EngineRunner(loaded)
