"""INT8 on nets with planted faults: how far each recipe falls below the same recipe on the net as it was.

    python bench/int8_stress.py --checkpoint CKPT --calib DIR --val DIR -o bench/results

Every case is held against its own float32 net on the same images. The files run in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise, product

import torch
from int8_setup import (
    add_data_options,
    compare,
    load_fused,
    read_calibration,
    read_validation,
    run_ours,
    run_torch,
    write_record,
)
from torch import Tensor

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG
from repvgg_deploy.quantize.codes import Target
from repvgg_deploy.quantize.edges import fused_blocks


def square_pairs(net: RepVGG) -> list[tuple[FusedBlock, FusedBlock]]:
    """Neighbouring blocks of which the second has as many outputs as inputs, stride 1: where an identity can be."""
    blocks = [block for _, block in fused_blocks(net)]
    return [
        (first, second)
        for first, second in pairwise(blocks)
        if second.conv.in_channels == second.conv.out_channels and second.conv.stride == (1, 1)
    ]


def weakest_channel(block: FusedBlock) -> int:
    """The output channel with the smallest filter: the one whose loss changes the net the least."""
    return int(block.conv.weight.flatten(1).norm(dim=1).argmin())


def bias_of(block: FusedBlock) -> Tensor:
    """The bias of the block's convolution."""
    assert block.conv.bias is not None
    return block.conv.bias


def leave_alone(net: RepVGG) -> None:
    """Nothing planted."""


@torch.no_grad()
def plant_constant(net: RepVGG, value: float, factor: float) -> None:
    """A channel that is always `value`, behind an identity of γ/σ = `factor` whose β − μγ/σ takes it back."""
    for first, second in square_pairs(net):
        channel = weakest_channel(first)
        first.conv.weight[channel] = 0
        bias_of(first)[channel] = value if value else -1.0
        second.conv.weight[channel, channel, 1, 1] += factor
        bias_of(second)[channel] -= factor * value


@torch.no_grad()
def plant_nearly_dead(net: RepVGG, factor: float) -> None:
    """A channel a hundred thousand times weaker than it was, behind an identity of γ/σ = `factor`."""
    for first, second in square_pairs(net):
        channel = weakest_channel(first)
        first.conv.weight[channel] *= 1e-5
        bias_of(first)[channel] *= 1e-5
        second.conv.weight[channel, channel, 1, 1] += factor


@torch.no_grad()
def plant_strong_channel(net: RepVGG, factor: float) -> None:
    """One channel of each block `factor` times what it was, and the columns that read it divided by as much."""
    blocks = [block for _, block in fused_blocks(net)]
    for first, second in pairwise(blocks):
        first.conv.weight[0] *= factor
        bias_of(first)[0] *= factor
        second.conv.weight[:, 0] /= factor


@torch.no_grad()
def plant_heavy_tails(net: RepVGG, share: float, factor: float) -> None:
    """A random `share` of all weights times `factor`."""
    generator = torch.Generator().manual_seed(0)
    for _, block in fused_blocks(net):
        chosen = torch.rand(block.conv.weight.shape, generator=generator) < share
        block.conv.weight[chosen] *= factor


CASES: dict[str, Callable[[RepVGG], None]] = {
    "as it was": leave_alone,
    "dead channels, γ/σ 316 (σ² = 0)": lambda net: plant_constant(net, 0.0, 316.0),
    "dead channels, γ/σ 1500": lambda net: plant_constant(net, 0.0, 1500.0),
    "constant channels (σ² = 0), γ/σ 316": lambda net: plant_constant(net, 0.5, 316.0),
    "nearly dead channels, γ/σ 1500": lambda net: plant_nearly_dead(net, 1500.0),
    "one channel 1000 x": lambda net: plant_strong_channel(net, 1000.0),
    "heavy tails: 0.05 % of the weights x 4": lambda net: plant_heavy_tails(net, 0.0005, 4.0),
}


def main() -> None:
    """Quantize every planted net with every recipe; print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_options(parser)
    parser.add_argument("--every", type=int, default=1, help="evaluate every n-th image")
    parser.add_argument("--recipes", nargs="+", default=["fast", "accurate"])
    parser.add_argument(
        "--targets", type=Target, nargs="+", default=[Target.PORTABLE], metavar="TARGET", help="as --qdq"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="by their names")
    parser.add_argument("--name", default="tinyimagenet", help="of the net, for the record")
    arguments = parser.parse_args()
    original = load_fused(arguments.checkpoint)
    calibration = read_calibration(arguments.calib, arguments.count)
    images, labels = read_validation(arguments.val)
    images, labels = images[:: arguments.every], labels[:: arguments.every]
    results = []
    for name in arguments.cases:
        net = copy.deepcopy(original)
        CASES[name](net)
        exact = run_torch(net, images)
        for recipe, target in product(arguments.recipes, arguments.targets):
            logits, _ = run_ours(net, recipe, calibration, images, target)
            for runs_on, values in logits.items():
                figures = compare(values, exact, labels)
                results.append({"case": name, "recipe": recipe, "runs_on": runs_on, **asdict(figures)})
                print(results[-1], flush=True)
    path = write_record(arguments.output, f"int8-stress-{arguments.name}", results)
    print(f"written {path}")


if __name__ == "__main__":
    main()
