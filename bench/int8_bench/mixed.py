"""What keeping layers in float gains: agreement and SQNR over the share of multiply-adds that is not INT8.

    python bench/int8.py mixed --checkpoint CKPT --calib DIR --val DIR -o bench/results --plots docs/figures

Layers are taken by measured sensitivity (`repvgg_deploy.quantization.mixed_precision`), and for comparison in
random order. The ranking is made on calibration images. Each candidate is quantized anew with its float layers, and
evaluated in the torch net that computes the graph's integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from int8_bench.options import FOLDER, Data, data_options, every_option
from int8_bench.setup import (
    Floats,
    compare,
    in_batches,
    load_fused,
    read_calibration,
    read_validation,
    run_torch,
    write_record,
)
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization import load_recipe, quantize
from repvgg_deploy.quantization.mixed_precision import RANKING_IMAGES, LayerSensitivity, layers_within, rank_layers
from repvgg_deploy.quantization.quantize import quantize_apart
from repvgg_deploy.quantization.recipe import Recipe
from repvgg_deploy.quantization.statistics import collect_statistics


def shuffle(ranking: Sequence[LayerSensitivity], seed: int) -> tuple[LayerSensitivity, ...]:
    """The same layers in an order that `seed` draws."""
    order = np.random.default_rng(seed).permutation(len(ranking))
    return tuple(ranking[index] for index in order)


@click.command()
@data_options
@every_option
@click.option("--recipe", default="accurate", show_default=True, metavar="NAME|FILE", help="The recipe to measure.")
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(0, 1),
    multiple=True,
    default=(0.0, 0.05, 0.1, 0.2, 0.3, 0.5),
    show_default=True,
    help="Multiply-adds to keep float; repeatable.",
)
@click.option(
    "--seed", "seeds", type=int, multiple=True, default=(1, 2, 3), show_default=True, help="A random order; repeatable."
)
@click.option("--calib-seed", type=int, default=0, show_default=True, help="Of the choice of calibration images.")
@click.option(
    "--plots", type=FOLDER, default=Path("docs/figures"), show_default=True, metavar="DIR", help="Folder of the plot."
)
@torch.no_grad()
def mixed(data: Data, every: int, recipe: str, plots: Path, **orders: Any) -> None:
    """What keeping layers in float gains, by sensitivity and at random."""
    from int8_bench.mixed_plot import write_plot

    fused = load_fused(data.checkpoint)
    images, labels = read_validation(data.val)
    validation = images[::every], labels[::every]
    calibration = read_calibration(data.calib, data.count, orders.pop("calib_seed"))
    candidates = Candidates(fused, load_recipe(recipe), calibration)
    exact = run_torch(fused, validation[0])
    results: list[dict[str, Any]] = []
    for row, net in candidates.quantize(**orders):
        results.append({**row, **asdict(compare(run_torch(net, validation[0]), exact, validation[1]))})
        print(results[-1], flush=True)
        path = write_record(
            data.output, "int8-mixed", results, calibration_images=len(calibration), recipe=recipe,
            ranking=[{**asdict(layer), "gain": layer.gain} for layer in candidates.ranking],
        )  # fmt: skip
    print(f"written {path}")
    write_plot(results, plots)


class Candidates:
    """A net with its layers ranked on the calibration images, and quantized with some of them left float."""

    def __init__(self, fused: RepVGG, recipe: Recipe, calibration: Floats) -> None:
        self._fused, self._recipe, self._batches = fused, recipe, in_batches(calibration)
        self._statistics = collect_statistics(fused, self._batches, augmentations=recipe.augmentations)
        step = max(1, len(calibration) // RANKING_IMAGES)
        apart = quantize_apart(fused, self._batches, recipe, self._statistics)
        self.ranking = rank_layers(apart, torch.from_numpy(calibration[::step]))

    def quantize(self, shares: Sequence[float], seeds: Sequence[int]) -> Iterator[tuple[dict[str, Any], nn.Module]]:
        """Every candidate and what it is: each share by sensitivity, then each but 0 in the order of each seed."""
        macs_share = {layer.name: layer.macs_share for layer in self.ranking}
        orders = [("sensitivity", None, self.ranking), *(("random", s, shuffle(self.ranking, s)) for s in seeds)]
        for (choice, seed, order), share in product(orders, shares):
            if choice == "random" and share == 0:
                continue
            names = layers_within(order, share)
            macs = round(sum(macs_share[name] for name in names), 4)
            row = {"choice": choice, "seed": seed, "share": share, "macs_float": macs, "layers": list(names)}
            yield row, quantize(self._fused, self._batches, self._recipe, self._statistics, keep_float=names)
