"""Decoding of JPEG files, inference, and both together: how fast, and how far apart the decoders' pixels are.

    pip install 'repvgg-deploy[cpu,serve]'
    python bench/decoding.py --images DIR --model MODEL -o bench/results

In turn, for several rounds: each decoder in one thread and on all cores; the model on pixels that are decoded already;
`predict` from files to rows with each decoder. What `predict` can reach at most is

- `both`, where decoding and inference share the cores: 1 / (1 / decoding + 1 / inference);
- `slower`, the slower of the two, where they do not: of a graph on the CPU with one thread each, and of an engine.

Seconds of CPU time say the same where something else runs on the machine: what an image costs in `predict`, and what it
costs in decoding and inference together.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import click
import numpy as np

from repvgg_deploy.cli.startup import share_cores
from repvgg_deploy.files.kinds import file_kind
from repvgg_deploy.hardware.cpu import read_cpu, usable_cores
from repvgg_deploy.images.decoding import DecodingOptions, read_pixels
from repvgg_deploy.images.reading import decode_ahead
from repvgg_deploy.images.sources import read_source

Decoder = Literal["auto", "pillow"]
NAMES = {"auto": "simplejpeg", "pillow": "pillow"}
_BATCH = 32


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--images", required=True, metavar="DIR", help="JPEG files, such as photographs of ImageNet's size.")
@click.option("--model", type=click.Path(path_type=Path), required=True, help="What `predict` runs.")
@click.option("--count", type=click.IntRange(min=1), default=512, show_default=True, help="Images per measurement.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Measurements of each kind.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("bench/results"), show_default=True)
def main(images: str, model: Path, count: int, rounds: int, output: Path) -> None:
    """Measure decoding, inference and both together, and write a record."""
    # Ahead of torch, which reads them when it is loaded.
    share_cores()
    from repvgg_deploy.workflows.predict import find_sources

    if DecodingOptions().library != "simplejpeg":
        raise click.ClickException("simplejpeg is not installed: there is nothing to compare")
    found = find_sources([images])
    # Bytes in memory: the disk is not what is measured.
    files = [read_source(source, 1 << 30) for source in found]
    files = list(itertools.islice(itertools.cycle(files), count))
    kinds = list_kinds(files, model)
    differences = compare_decoders(files[: len(found)], model)
    measured = measure(kinds, rounds)
    bounds = find_bounds(measured, file_kind(model) == "engine")
    for line in (*show_rates(measured), *show_bounds(bounds)):
        click.echo(line)
    click.echo(f"pixels of the decoders: {differences}")
    click.echo(f"written {write_record(output, model, len(files), differences, measured, bounds)}")


@dataclass(frozen=True)
class Kind:
    """One thing that is measured: `run` takes `images` images through it."""

    run: Callable[[], object]
    images: int


@dataclass(frozen=True)
class Rates:
    """What was measured of one kind, a value per round."""

    images_per_sec: list[float]
    cpu_ms_per_image: list[float]

    @property
    def rate(self) -> float:
        """The median of the images per second."""
        return round(statistics.median(self.images_per_sec), 1)

    @property
    def cpu_ms(self) -> float:
        """The median of the CPU time of an image, over all threads."""
        return round(statistics.median(self.cpu_ms_per_image), 3)


@dataclass(frozen=True)
class Bound:
    """What `predict` reaches, and what it could at most; see the top of this file."""

    kind: Literal["both", "slower"]
    rate: float
    bound: float
    cpu_ms: float
    parts_cpu_ms: float

    @property
    def share(self) -> float:
        """The share of the bound that is reached."""
        return round(self.rate / self.bound, 3)


def list_kinds(files: list[bytes], path: Path) -> dict[str, Kind]:
    """All that is measured, by name."""
    from repvgg_deploy.runtime.model import Model, open_model
    from repvgg_deploy.serving import PredictOptions, Predictor

    model = open_model(path)
    pixels = np.stack([read_pixels(file, model.preprocessing) for file in files[:_BATCH]])

    def decode(decoder: Decoder, workers: int | None) -> None:
        options = DecodingOptions(workers, decoder=decoder)
        with closing(decode_ahead(files, model.preprocessing, 4 * _BATCH, options)) as decoded:
            for _ in decoded:
                pass

    def infer(model: Model) -> None:
        for _ in range(0, len(files), len(pixels)):
            model.run_pixels(pixels)

    def predict(model: Model, decoder: Decoder, workers: int | None) -> None:
        options = PredictOptions(batch=_BATCH, decoding=DecodingOptions(workers, decoder=decoder))
        for _ in Predictor(model, options).stream(files):
            pass

    whole = -(-len(files) // len(pixels)) * len(pixels)
    kinds = {"inference": Kind(partial(infer, model), whole)}
    for decoder in get_args(Decoder):
        name = NAMES[decoder]
        kinds[f"decode, {name}"] = Kind(partial(decode, decoder, None), len(files))
        kinds[f"decode, {name}, 1 thread"] = Kind(partial(decode, decoder, 1), len(files))
        kinds[f"predict, {name}"] = Kind(partial(predict, model, decoder, None), len(files))
    if file_kind(path) == "onnx":
        single = open_model(path, threads=1)
        kinds["inference, 1 thread"] = Kind(partial(infer, single), whole)
        kinds["predict, simplejpeg, 1 thread each"] = Kind(partial(predict, single, "auto", 1), len(files))
    return kinds


def compare_decoders(files: list[bytes], path: Path) -> dict[str, float]:
    """How far the prepared pixels of simplejpeg and torch are from Pillow's, of 255."""
    from repvgg_deploy.runtime.model import open_model

    preprocessing = open_model(path).preprocessing
    both = [
        [read_pixels(file, preprocessing, DecodingOptions(decoder=decoder)) for file in files]
        for decoder in get_args(Decoder)
    ]
    difference = np.abs(np.stack(both[0]).astype(np.int16) - np.stack(both[1]))
    return {
        "largest": int(difference.max()),
        "equal_percent": round(100 * float((difference == 0).mean()), 3),
        "within_1_percent": round(100 * float((difference <= 1).mean()), 3),
    }


def measure(kinds: dict[str, Kind], rounds: int) -> dict[str, Rates]:
    """Every kind in turn, every second round in reverse; a round ahead of the measured ones does not count."""
    rates: dict[str, Rates] = {name: Rates([], []) for name in kinds}
    for number in range(rounds + 1):
        for name in reversed(kinds) if number % 2 else kinds:
            start, start_cpu = time.perf_counter(), time.process_time()
            kinds[name].run()
            seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            if number:
                images = kinds[name].images
                rates[name].images_per_sec.append(round(images / seconds, 2))
                rates[name].cpu_ms_per_image.append(round(1000 * cpu / images, 4))
    return rates


def find_bounds(measured: dict[str, Rates], of_engine: bool) -> dict[str, Bound]:
    """What each kind of `predict` could reach."""
    bounds = {}
    for name, rates in measured.items():
        if not name.startswith("predict"):
            continue
        alone = name.endswith("1 thread each")
        decode = measured[name.replace("predict", "decode").replace(" each", "")]
        infer = measured["inference, 1 thread" if alone else "inference"]
        slower = alone or of_engine
        most = min(decode.rate, infer.rate) if slower else round(1 / (1 / decode.rate + 1 / infer.rate), 1)
        parts = round(decode.cpu_ms + infer.cpu_ms, 3)
        bounds[name] = Bound("slower" if slower else "both", rates.rate, most, rates.cpu_ms, parts)
    return bounds


def show_rates(measured: dict[str, Rates]) -> list[str]:
    """The table of what was measured."""
    rows = [f"{name:34} {rates.rate:9,.1f} {rates.cpu_ms:9.2f}" for name, rates in sorted(measured.items())]
    return [f"{'':34} {'images/s':>9} {'CPU ms':>9}", *rows]


def show_bounds(bounds: dict[str, Bound]) -> list[str]:
    """The table of what could be reached, and how much of it is."""
    head = f"{'':34} {'bound':>9} {'reached':>9}   CPU time of the parts, of the whole"
    rows = [
        f"{name:34} {bound.bound:9,.1f} {bound.share:9.1%}   {bound.parts_cpu_ms:.2f} ms, {bound.cpu_ms:.2f} ms"
        f" ({bound.kind})"
        for name, bound in bounds.items()
    ]
    return ["", head, *rows, ""]


def write_record(
    folder: Path,
    model: Path,
    images: int,
    differences: dict[str, float],
    measured: dict[str, Rates],
    bounds: dict[str, Bound],
) -> Path:
    """Write the JSON record, named after the backend, the day and the model."""
    from repvgg_deploy.runtime.model import open_model

    date, opened = time.strftime("%Y-%m-%d", time.gmtime()), open_model(model)
    record: dict[str, Any] = {
        "kind": "decoding",
        "date": date,
        "machine": {"cpu": read_cpu().model, "cores": usable_cores(), "system": platform.system()},
        "versions": {name: version(name) for name in ("Pillow", "simplejpeg", "torch", "numpy")},
        "model": model.name,
        "backend": f"{opened.runner.backend} {opened.runner.backend_version}",
        "preprocessing": json.loads(opened.preprocessing.to_json()),
        "batch": _BATCH,
        "images": images,
        "pixel_differences": differences,
        "predict": {name: {**vars(bound), "share": bound.share} for name, bound in bounds.items()},
        "median_images_per_sec": {name: rates.rate for name, rates in measured.items()},
        "median_cpu_ms_per_image": {name: rates.cpu_ms for name, rates in measured.items()},
        "images_per_sec": {name: rates.images_per_sec for name, rates in measured.items()},
        "cpu_ms_per_image": {name: rates.cpu_ms_per_image for name, rates in measured.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{opened.runner.backend}-{date}-decoding-{model.stem}.json"
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


if __name__ == "__main__":
    main()
