"""Fixtures of the tests of engines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.engine_graphs import rtx_backend
from helpers.simulated_engine import tensorrt_like

from repvgg_deploy.engine.backends import Backend


@pytest.fixture(params=[rtx_backend, tensorrt_like], ids=["tensorrt-rtx", "tensorrt"])
def backend(request: pytest.FixtureRequest) -> Backend:
    make: Callable[[], Backend] = request.param
    return make()
