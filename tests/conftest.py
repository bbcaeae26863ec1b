"""Fixtures of all tests: the shared files, timm, small nets and checkpoints made of them."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.simplification import check_in_this_process
from helpers.small_nets import make_net, name_in_layout
from PIL import Image

from repvgg_deploy.nets.repvgg import RepVGG

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is left to the exhaustive run is no quick test either."""
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    # Where several processes share the tests, one thread each.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def _own_compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of compiled nets that no other CPU has filled: its code may be for instructions that this one lacks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache folder is not the tests'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def onnxsim_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export asks onnxsim in this process: to start one for it takes longer than all else that a small net needs.

    The process itself is what `graphs/test_simplification.py` tests, and is part of every test that runs the program.
    """
    check_in_this_process(monkeypatch)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden checkpoints, data and trained weights beside the repository."""
    if not _SHARED.is_dir():
        pytest.skip("the folder ../shared with the golden files is not here")
    return _SHARED


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """The module timm; it imports torchvision, whose operators need not be there for RepVGG."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _declare_torchvision_operators()
            import timm as module
    except Exception as error:
        pytest.skip(f"timm cannot be imported here: {error}")
    return module


# Declared operators live as long as this object.
_torchvision: list[torch.library.Library] = []


def _declare_torchvision_operators() -> None:
    """Declare the schemas that importing torchvision registers a fake for, where its compiled part does not load."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _torchvision:
        return
    try:
        torch.ops.load_library(str(next(Path(found.origin).parent.glob("_C*.so"))))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision.append(library)


@pytest.fixture
def net() -> RepVGG:
    """A small RepVGG in training form with random weights and realistic BN statistics."""
    return make_net()


@pytest.fixture
def state(net: RepVGG) -> dict[str, torch.Tensor]:
    """The tensors of `net` under the names of the official code."""
    return name_in_layout(net, "official")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write any object with torch.save (or, by its ending, safetensors) and return the path."""

    def write(value: Any, name: str = "checkpoint.pth", **options: Any) -> Path:
        path = tmp_path / name
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(value, path, **options)
        else:
            torch.save(value, path, **options)
        return path

    return write


@pytest.fixture
def checkpoint_file(save: Callable[..., Path], state: dict[str, torch.Tensor]) -> Path:
    """A small official checkpoint in training form."""
    return save(state)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Four normalized inputs of 32 pixels."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Five class folders with three noise pictures each, of different sizes and formats."""
    folder = tmp_path / "images"
    generator = np.random.default_rng(3)
    for label in range(5):
        (folder / f"class{label}").mkdir(parents=True)
        for number, (width, height, ending) in enumerate([(40, 32, "png"), (32, 50, "jpg"), (64, 64, "bmp")]):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.{ending}")
    return folder
