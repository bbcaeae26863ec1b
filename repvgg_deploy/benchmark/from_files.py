"""From files to classes: decode, resize, prepare, infer, each stage by itself and all of them side by side."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.artifacts import Array, PreprocessingOptions
from repvgg_deploy.benchmark.workloads import require_numbers
from repvgg_deploy.errors import ImageError
from repvgg_deploy.hardware.cpu import usable_cores
from repvgg_deploy.hardware.threads import start_workers
from repvgg_deploy.images.decoding import Pixels, crop_image, decode_image, normalize
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.images.sources import ImageSource, list_images
from repvgg_deploy.runtime.model import Model, open_model

_SAMPLE = 64


@dataclass(frozen=True)
class EndToEnd:
    """Images per second of the whole, and of every stage by itself on all cores.

    `stages` has `decode`, `resize`, `prepare` (stacking, and normalizing where the graph does not), for an engine
    `transfer` (to the GPU), and `inference`. `limit` is the slowest of them: on a CPU the stages share the cores, so
    the whole is slower still.
    """

    model: str
    backend: str
    input_type: str
    batch: int
    images: int
    images_per_sec: float
    stages: dict[str, float]
    limit: str

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def measure_end_to_end(
    path: Path, folder: Path, batch: int, seconds: float = 3.0, options: PreprocessingOptions | None = None
) -> EndToEnd:
    """Measure a model from the image files below `folder` on; they are read again and again for `seconds`.

    A first pass, which does not count, brings the files into the system's cache. `options` overrides how the model
    says that images are prepared.

    Raises:
        DeployError: the model or the images cannot be used.
        VerificationError: the model gives NaN or Inf.
    """
    model = open_model(path, options or PreprocessingOptions())
    paths = list_images(folder)
    sample = [path for path, _ in zip(itertools.cycle(paths), range(max(_SAMPLE, batch)), strict=False)]
    stages = _time_stages(model, sample, batch, seconds / 4)
    images, whole = _time_whole(model, paths, batch, seconds)
    return EndToEnd(
        model=path.name,
        backend=model.runner.backend,
        input_type="uint8" if model.takes_pixels else "float16" if model.half_input else "float32",
        batch=batch,
        images=images,
        images_per_sec=whole,
        stages=stages,
        limit=min(stages, key=lambda name: stages[name]),
    )


def _time_stages(model: Model, sample: list[ImageSource], batch: int, seconds: float) -> dict[str, float]:
    decoded = [decode_image(path) for path in sample]
    cropped = [np.asarray(crop_image(image, model.preprocessing)) for image in decoded]
    pixels: Pixels = np.stack(cropped[:batch])

    def prepare() -> Array:
        stacked: Pixels = np.stack(cropped[:batch])
        return stacked if model.takes_pixels else normalize(stacked, model.preprocessing)

    inputs = prepare()
    require_numbers(model.path.name, model.run_images(inputs).values())
    with start_workers(usable_cores()) as pool:
        stages = {
            "decode": _rate(lambda: list(pool.map(decode_image, sample)), len(sample), seconds),
            "resize": _rate(
                lambda: list(pool.map(lambda image: crop_image(image, model.preprocessing).load(), decoded)),
                len(sample),
                seconds,
            ),
            "prepare": _rate(prepare, len(pixels), seconds),
        }
    runner: Any = model.runner
    if not hasattr(runner, "batch_streams"):
        return {**stages, "inference": _rate(lambda: model.run_images(inputs), len(pixels), seconds)}
    stream = runner.batch_streams(inputs)[0]
    return {
        **stages,
        "transfer": _rate(lambda: (stream.upload(), stream.synchronize()), len(pixels), seconds),
        "inference": _rate(lambda: (stream.enqueue(), stream.synchronize()), len(pixels), seconds),
    }


def _rate(call: Callable[[], object], images: int, seconds: float) -> float:
    """Images per second of a call, after one that does not count."""
    call()
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return calls * images / (time.perf_counter() - start)


def _time_whole(model: Model, paths: tuple[ImageSource, ...], batch: int, seconds: float) -> tuple[int, float]:
    """Images, and images per second, with threads that decode ahead of the inference."""
    broken = BrokenImages()
    for pixels in _endless(model, paths, batch, broken):
        model.run_pixels(pixels)
        break
    images = 0
    start = time.perf_counter()
    for pixels in _endless(model, paths, batch, broken):
        model.run_pixels(pixels)
        images += len(pixels)
        if time.perf_counter() - start >= seconds:
            break
    if broken.reasons:
        raise ImageError(next(iter(broken.reasons.values())), "remove it: without it, other images would be measured")
    return images, images / (time.perf_counter() - start)


def _endless(model: Model, paths: tuple[ImageSource, ...], batch: int, broken: BrokenImages) -> Iterator[Pixels]:
    # The threads that decode ahead begin anew with every list, so lists are long.
    repeats = max(1, 4096 // len(paths))
    while True:
        found = False
        for pixels, _ in read_batches(paths * repeats, model.preprocessing, batch, broken):
            found = True
            yield pixels
        if not found:
            raise ImageError("none of the images can be read", "look at one of them")
