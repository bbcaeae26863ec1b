"""Tests that need an NVIDIA GPU; elsewhere they are skipped with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.hardware.gpus import find_gpus


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    found = find_gpus()
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not found.gpus:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {found.reason}"))


@pytest.fixture
def cuda_torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch
