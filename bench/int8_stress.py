"""INT8 on nets with planted faults: how far each recipe falls below the same recipe on the net as it was.

    python bench/int8_stress.py --checkpoint CKPT --calib DIR --val DIR -o bench/results

Every case is held against its own float32 net on the same images. The files run in ONNX Runtime.
`int8_plants.py` has the faults; with `--float` the planted nets themselves are looked at, and nothing is quantized.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from int8_plants import CASES, USUAL_CASES
from int8_setup import (
    Floats,
    add_data_options,
    compare,
    load_fused,
    read_calibration,
    read_validation,
    run_ours,
    run_torch,
    write_record,
)
from numpy.typing import NDArray
from torch import nn

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


def main() -> None:
    """Quantize every planted net with every recipe; print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_options(parser)
    parser.add_argument("--every", type=int, default=1, help="evaluate every n-th image")
    parser.add_argument("--recipes", nargs="+", default=["fast", "accurate"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=USUAL_CASES, metavar="CASE", help="by their names")
    parser.add_argument("--float", action="store_true", help="look at the planted nets and quantize nothing")
    parser.add_argument("--name", default="tinyimagenet", help="of the net, for the record")
    arguments = parser.parse_args()
    original = load_fused(arguments.checkpoint)
    calibration = read_calibration(arguments.calib, arguments.count)
    images, labels = read_validation(arguments.val)
    images, labels = images[:: arguments.every], labels[:: arguments.every]
    try:
        nets = {name: CASES[name](original, calibration) for name in arguments.cases}
    except ValueError as error:
        parser.error(str(error))
    if arguments.float:
        unplanted = run_torch(original, images)
        rows = [
            {"case": name, **describe(net, run_torch(net, images), unplanted, labels)} for name, net in nets.items()
        ]
        for row in rows:
            print(row)
        print(f"written {write_record(arguments.output, f'int8-stress-{arguments.name}-float', rows)}")
        return
    results = []
    for name, net in nets.items():
        exact = run_torch(net, images)
        for recipe in arguments.recipes:
            logits, _ = run_ours(net, recipe, calibration, images)
            for runs_on, values in logits.items():
                figures = compare(values, exact, labels)
                results.append({"case": name, "recipe": recipe, "runs_on": runs_on, **asdict(figures)})
                print(results[-1], flush=True)
    path = write_record(arguments.output, f"int8-stress-{arguments.name}", results)
    print(f"written {path}")


if __name__ == "__main__":
    main()
