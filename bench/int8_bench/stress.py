"""INT8 on nets with planted faults: how far each recipe falls below the same recipe on the net as it was.

    python bench/int8.py faults --checkpoint CKPT --calib DIR --val DIR -o bench/results     # the nets in float32
    python bench/int8.py stress --checkpoint CKPT --calib DIR --val DIR -o bench/results

Every case is held against its own float32 net on the same images. The files run in ONNX Runtime. The faults are in
`faults.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from int8_bench.faults import CASES, USUAL_CASES
from int8_bench.options import Command, Data, data_options, every_option, recipes_option
from int8_bench.setup import (
    Floats,
    compare,
    load_fused,
    read_calibration,
    read_validation,
    run_ours,
    run_torch,
    write_record,
)
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.points import fused_blocks


def describe(net: RepVGG, logits: Floats, unplanted: Floats, labels: NDArray[np.int64]) -> dict[str, Any]:
    """What a planted net is in float32: how near it is to the net as it was, and the shape of its kernels.

    `kurtosis` is that of a filter without the weight that an identity adds to, the mean over the filters of each block.
    """
    energy = np.sort((logits.astype(np.float64) ** 2).sum(1))
    return {
        "top1": round(float((logits.argmax(1) == labels).mean()) * 100, 2),
        "class_as_it_was": round(float((logits.argmax(1) == unplanted.argmax(1)).mean()) * 100, 2),
        "energy_of_eight_strongest": round(float(energy[-8:].sum() / energy.sum()) * 100, 2),
        "kurtosis": {name: round(kurtosis(block.conv), 1) for name, block in fused_blocks(net)},
    }


def kurtosis(conv: nn.Conv2d) -> float:
    """The fourth moment of a filter's weights over the square of the second, the mean over filters with any."""
    weight = conv.weight.double()
    counted = torch.ones_like(weight)
    if conv.in_channels == conv.out_channels:
        counted[range(len(weight)), range(len(weight)), 1, 1] = 0
    count = counted.flatten(1).sum(1)
    second, fourth = ((weight**power * counted).flatten(1).sum(1) / count for power in (2, 4))
    return float((fourth / second.square())[second > 0].mean())


@dataclass(frozen=True)
class Planted:
    """The net as it was, the planted ones by case, and the images."""

    original: RepVGG
    nets: dict[str, RepVGG]
    calibration: Floats
    images: Floats
    labels: NDArray[np.int64]


def planted_options(command: Command) -> Command:
    """The nets that a command looks at, and the name in its record: it gets a `Planted`, the folder and the name."""

    @data_options
    @every_option
    @click.option(
        "--case",
        "cases",
        type=click.Choice(list(CASES)),
        multiple=True,
        default=USUAL_CASES,
        metavar="CASE",
        help=f"A planted fault; repeatable. All but the last by default: {'; '.join(CASES)}.",
    )
    @click.option("--name", default="tinyimagenet", show_default=True, help="Name of the net, for the record.")
    @functools.wraps(command)
    def run(data: Data, every: int, cases: Sequence[str], name: str, **options: Any) -> None:
        original = load_fused(data.checkpoint)
        calibration = read_calibration(data.calib, data.count)
        images, labels = read_validation(data.val)
        try:
            nets = {case: CASES[case](original, calibration) for case in cases}
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        planted = Planted(original, nets, calibration, images[::every], labels[::every])
        command(planted, data.output, name, **options)

    return run


@click.command()
@planted_options
def faults(planted: Planted, output: Path, name: str) -> None:
    """What the planted nets are in float32; nothing is quantized."""
    unplanted = run_torch(planted.original, planted.images)
    rows = []
    for case, net in planted.nets.items():
        rows.append({"case": case, **describe(net, run_torch(net, planted.images), unplanted, planted.labels)})
        print(rows[-1], flush=True)
    print(f"written {write_record(output, f'int8-stress-{name}-float', rows)}")


@click.command()
@planted_options
@recipes_option("fast", "accurate")
def stress(planted: Planted, output: Path, name: str, recipes: Sequence[str]) -> None:
    """The recipes on nets with planted faults."""
    results = []
    for case, net in planted.nets.items():
        exact = run_torch(net, planted.images)
        for recipe in recipes:
            logits, _ = run_ours(net, recipe, planted.calibration, planted.images)
            for runs_on, values in logits.items():
                figures = compare(values, exact, planted.labels)
                results.append({"case": case, "recipe": recipe, "runs_on": runs_on, **asdict(figures)})
                print(results[-1], flush=True)
    print(f"written {write_record(output, f'int8-stress-{name}', results)}")
