"""Decoding of JPEG files, inference, and both together: how fast, and how far apart the decoders' pixels are.

    pip install 'repvgg-deploy[cpu,serve]'
    python bench/decoding.py --images DIR --model MODEL -o bench/results

In turn, for several rounds: each decoder in one thread and in as many as there are cores; the model on pixels that
are decoded already; `predict` from files to rows with each decoder. On a CPU decoding and inference share the cores,
so that the whole cannot be faster than `shared`, 1 / (1 / decoding + 1 / inference); where a GPU infers, it cannot be
faster than the slower of the two. Nothing else should run on the machine.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import click
import numpy as np

from repvgg_deploy.hardware.cpu import read_cpu
from repvgg_deploy.images.decoding import DecodingOptions, read_pixels
from repvgg_deploy.images.reading import decode_ahead
from repvgg_deploy.images.sources import read_source
from repvgg_deploy.runtime.model import Model, open_model
from repvgg_deploy.serving import PredictOptions, Predictor
from repvgg_deploy.workflows.predict import find_sources

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
    if DecodingOptions().library != "simplejpeg":
        raise click.ClickException("simplejpeg is not installed: there is nothing to compare")
    found = find_sources([images])
    # Bytes in memory: the disk is not what is measured.
    files = [read_source(source, 1 << 30) for source in found]
    files = list(itertools.islice(itertools.cycle(files), count))
    opened = open_model(model)
    differences = compare_decoders(files[: len(found)], opened)
    click.echo(f"pixels: {differences}")
    rates = measure(files, opened, rounds)
    summary = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    for decoder in NAMES.values():
        decode, infer = summary[f"decode, {decoder}, all cores"], summary["inference"]
        summary[f"slower of the two, {decoder}"] = min(decode, infer)
        summary[f"shared, {decoder}"] = round(1 / (1 / decode + 1 / infer), 1)
    for name, rate in summary.items():
        click.echo(f"{name:32} {rate:10,.1f} images/s")
    click.echo(f"written {write_record(output, opened, len(files), differences, rates, summary)}")


def compare_decoders(files: list[bytes], model: Model) -> dict[str, float]:
    """How far the prepared pixels of simplejpeg and torch are from Pillow's, of 255."""
    both = [
        [read_pixels(file, model.preprocessing, DecodingOptions(decoder=decoder)) for file in files]
        for decoder in get_args(Decoder)
    ]
    difference = np.abs(np.stack(both[0]).astype(np.int16) - np.stack(both[1]))
    return {
        "largest": int(difference.max()),
        "equal_percent": round(100 * float((difference == 0).mean()), 3),
        "within_1_percent": round(100 * float((difference <= 1).mean()), 3),
    }


def measure(files: list[bytes], model: Model, rounds: int) -> dict[str, list[float]]:
    """Images per second of every kind, one value per round; a round ahead of the measured ones does not count."""
    pixels = np.stack([read_pixels(file, model.preprocessing) for file in files[:_BATCH]])

    def decode(decoder: Decoder, workers: int | None) -> None:
        options = DecodingOptions(workers, decoder=decoder)
        with closing(decode_ahead(files, model.preprocessing, 4 * _BATCH, options)) as decoded:
            for _ in decoded:
                pass

    def infer() -> None:
        for _ in range(0, len(files), len(pixels)):
            model.run_pixels(pixels)

    def predict(decoder: Decoder) -> None:
        options = PredictOptions(batch=_BATCH, decoding=DecodingOptions(decoder=decoder))
        for _ in Predictor(model, options).stream(files):
            pass

    jobs: dict[str, Callable[[], None]] = {"inference": infer}
    for decoder in get_args(Decoder):
        name = NAMES[decoder]
        jobs[f"decode, {name}, 1 thread"] = partial(decode, decoder, 1)
        jobs[f"decode, {name}, all cores"] = partial(decode, decoder, os.cpu_count())
        jobs[f"predict, {name}"] = partial(predict, decoder)
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                # Inference takes whole batches.
                done = -(-len(files) // len(pixels)) * len(pixels) if name == "inference" else len(files)
                rates[name].append(round(done / (time.perf_counter() - start), 2))
    return rates


def write_record(
    folder: Path,
    model: Model,
    images: int,
    differences: dict[str, float],
    rates: dict[str, list[float]],
    summary: dict[str, float],
) -> Path:
    """Write the JSON record, named after what is measured and the day."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    record: dict[str, Any] = {
        "kind": "decoding",
        "date": date,
        "machine": {"cpu": read_cpu().model, "cores": os.cpu_count(), "system": platform.system()},
        "versions": {name: version(name) for name in ("Pillow", "simplejpeg", "torch", "numpy")},
        "model": model.path.name,
        "backend": f"{model.runner.backend} {model.runner.backend_version}",
        "preprocessing": json.loads(model.preprocessing.to_json()),
        "batch": _BATCH,
        "images": images,
        "pixel_differences": differences,
        "median_images_per_sec": summary,
        "images_per_sec": rates,
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"cpu-{date}-decoding.json"
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


if __name__ == "__main__":
    main()
