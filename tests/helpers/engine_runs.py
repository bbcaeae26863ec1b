"""What the simulated engine computes, and arrays on its GPU."""

from __future__ import annotations

import numpy as np

from helpers.engine_graphs import CLASSES, PIXELS
from helpers.simulated_engine import SimulatedCuda, SimulatedEngine
from repvgg_deploy.engine.cuda.interface import DeviceArray
from repvgg_deploy.engine.loading import LoadedEngine


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, PIXELS, PIXELS)).astype(np.float32)


def expected(images: np.ndarray) -> np.ndarray:
    return 2 * images.reshape(len(images), 3 * PIXELS * PIXELS)[:, :CLASSES]


def parts(loaded: LoadedEngine) -> tuple[SimulatedCuda, SimulatedEngine]:
    assert isinstance(loaded.cuda, SimulatedCuda)
    return loaded.cuda, loaded.engine


FAULT = "CUDA says an illegal memory access was encountered"


def on_device(loaded: LoadedEngine, images: np.ndarray) -> DeviceArray:
    array = DeviceArray(loaded.cuda.allocate(images.nbytes), images.shape, images.dtype)
    loaded.cuda.copy_to_device(array.pointer, images, 0)
    return array


def read(loaded: LoadedEngine, array: DeviceArray) -> np.ndarray:
    values = np.empty(array.shape, array.dtype)
    loaded.cuda.copy_to_host(values, array.pointer, 0)
    return values
