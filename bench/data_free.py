"""INT8 without images: calibration pictures made from BN statistics, beside real images, noise and ranges alone.

    python bench/data_free.py table --checkpoint CKPT --calib DIR --val DIR [-o bench/results]
    python bench/data_free.py size  --checkpoint CKPT --val DIR [-o bench/results]
    python bench/data_free.py wide  [--arch B1] [-o bench/results]
    python bench/data_free.py plot  --checkpoint CKPT -o docs/figures/data_free.png

`table` quantizes one net on made pictures, on the first half and the first quarter of them, on 8, 32, 128 and 512 real
images, on made pictures and a few real ones, on noise, and with ranges that follow from the BN statistics without any
picture. `size` says what smaller pictures and fewer steps cost and give. `wide` makes pictures for a large
architecture with seeded weights. `plot` draws the made pictures. All figures are of the torch net that computes what
ONNX Runtime computes, integer for integer, so that no CPU's kernels matter.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from int8_bench.setup import (
    PREPROCESSING,
    Floats,
    compare,
    in_batches,
    read_calibration,
    read_validation,
    run_torch,
    write_record,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import RepVGG, TrainingBlock
from repvgg_deploy.nets.seeding import seeded_repvgg
from repvgg_deploy.quantization import load_recipe, quantize
from repvgg_deploy.quantization.data_free import MadePictures, make_pictures
from repvgg_deploy.quantization.net import QuantizedNet
from repvgg_deploy.quantization.pair_sums import count_taps
from repvgg_deploy.quantization.points import CLASSIFIER, fused_blocks
from repvgg_deploy.quantization.recipe import PictureOptions
from repvgg_deploy.quantization.rounding import choose_weight_scales, round_weights
from repvgg_deploy.quantization.state import LayerIntegers, Reconstruction

REAL = (8, 32, 128, 512)
MIXED = (8, 32)
SIZES = ((64, 128, 60), (48, 128, 150), (32, 128, 150))
_DEVIATIONS = 6.0


def main() -> None:
    """Run the command that is named."""
    warnings.filterwarnings("ignore", ".*calibration images are few")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in {"table": run_table, "size": run_sizes, "wide": run_wide, "plot": run_plot}.items():
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("-o", "--output", type=Path, default=Path("bench/results"))
        command.add_argument("--note", help="of the machine: what else it did")
        if name == "wide":
            command.add_argument("--arch", default="B1")
        else:
            command.add_argument("--checkpoint", type=Path, required=True)
        if name == "table":
            command.add_argument("--calib", type=Path, required=True)
            command.add_argument("--recipe", default="accurate")
        if name in ("table", "size"):
            command.add_argument("--val", type=Path, required=True)
            command.add_argument("--images", type=int, help="of the validation images; all by default")
    arguments = parser.parse_args()
    arguments.run(arguments)


def run_table(arguments: argparse.Namespace) -> None:
    """The table of the how-to page: one net, calibrated on different things."""
    net, fused = load_both(arguments.checkpoint)
    images, labels = read_validation(arguments.val, arguments.images)
    exact = run_torch(fused, images)
    recipe = load_recipe(arguments.recipe)
    results: list[dict[str, Any]] = []

    def add(what: str, make: Callable[[], QuantizedNet], **more: Any) -> None:
        quantized, seconds = cpu_timed(make)
        figures = compare(run_torch(quantized, images), exact, labels)
        results.append({"calibration": what, "quantize_cpu_s": seconds, **asdict(figures), **more})
        print(results[-1], flush=True)

    made, seconds = cpu_timed(lambda: make_pictures(net, PREPROCESSING, recipe.pictures, recipe.seed))
    about = {"make_cpu_s": seconds, **made.summary.to_dict()}
    add("pictures from BN statistics", lambda: quantize(fused, made, recipe), **about)
    # Batches are made one after another, so the first ones are what a smaller count gives.
    for count in (len(made) // 2, len(made) // 4):
        add(f"{count} pictures from BN statistics", partial(quantize, fused, [made.pictures[:count]], recipe))
    add("noise pictures", lambda: quantize(fused, draw_noise(made.summary.pictures), recipe))
    add("ranges from BN statistics", lambda: quantize_by_ranges(net, fused))
    for count in REAL:
        real = read_calibration(arguments.calib, count)
        add(f"{count} real images", partial(quantize, fused, in_batches(real), recipe))
    for count in MIXED:
        few = [*in_batches(read_calibration(arguments.calib, count)), *(batch.numpy() for batch in made)]
        add(f"made pictures and {count} real images", partial(quantize, fused, few, recipe))
    write_record(
        arguments.output, "int8-data-free", results, recipe=recipe.name, note=arguments.note, torch_threads=threads()
    )


def run_sizes(arguments: argparse.Namespace) -> None:
    """What size and steps of the pictures cost, and what they give."""
    net, fused = load_both(arguments.checkpoint)
    images, labels = read_validation(arguments.val, arguments.images)
    exact = run_torch(fused, images)
    results = []
    for size, count, steps in SIZES:
        options = PictureOptions(count=count, steps=steps)
        smaller = replace(PREPROCESSING, height=size, width=size, resize=size)
        made, seconds = cpu_timed(partial(make_pictures, net, smaller, options))
        quantized = quantize(fused, made, load_recipe("accurate"))
        figures = compare(run_torch(quantized, images), exact, labels)
        results.append({"make_cpu_s": seconds, **made.summary.to_dict(), **asdict(figures)})
        print(results[-1], flush=True)
    about = {"recipe": "accurate", "note": arguments.note, "torch_threads": threads()}
    write_record(arguments.output, "int8-data-free-sizes", results, **about)


def run_wide(arguments: argparse.Namespace) -> None:
    """The time that pictures for a large architecture take at 224 px; its weights are seeded, not trained."""
    net = seeded_repvgg(find_card(arguments.arch))
    made, seconds = cpu_timed(lambda: make_pictures(net, Preprocessing()))
    results = [{"arch": arguments.arch, "input": 224, "make_cpu_s": seconds, **made.summary.to_dict()}]
    print(results[0])
    write_record(
        arguments.output,
        f"int8-data-free-{arguments.arch}",
        results,
        note=arguments.note,
        torch_threads=threads(),
    )


def run_plot(arguments: argparse.Namespace) -> None:
    """The first pictures that are made by default."""
    net, _ = load_both(arguments.checkpoint)
    default = PictureOptions()
    # Batches are made one after another, so the first is the same whatever their number.
    made = make_pictures(net, PREPROCESSING, replace(default, count=default.batch))
    draw(made, default.count, arguments.output)


def draw(made: MadePictures, count: int, target: Path) -> None:
    """A sheet of the first of `count` pictures."""
    from matplotlib.figure import Figure

    pixels = to_pixels(made, PREPROCESSING)[:32]
    figure = Figure(figsize=(8, 4.2))
    for axis, picture in zip(figure.subplots(4, 8).flat, pixels, strict=True):
        axis.imshow(picture)
        axis.axis("off")
    figure.suptitle(f"{len(pixels)} of {count} images synthesized from BN statistics", fontsize=10)
    figure.tight_layout(pad=0.3)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=80)


def load_both(path: Path) -> tuple[RepVGG, RepVGG]:
    """The training form of a checkpoint and its fused float32 net."""
    net = build(load_checkpoint(path))
    return net, fuse(net, torch.float32).eval().requires_grad_(False)


def draw_noise(count: int) -> list[Floats]:
    """Normalized white noise over the whole range of pixel values."""
    generator = np.random.default_rng(0)
    pixels = generator.random((count, 3, PREPROCESSING.height, PREPROCESSING.width), dtype=np.float32)
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (PREPROCESSING.mean, PREPROCESSING.std))
    return in_batches((pixels - mean) / std)


def to_pixels(made: MadePictures, preprocessing: Preprocessing) -> Floats:
    """Pictures (N, H, W, C) with values from 0 to 1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return cast(Floats, (made.pictures * std + mean).permute(0, 2, 3, 1).numpy())


@torch.no_grad()
def quantize_by_ranges(net: RepVGG, fused: RepVGG) -> QuantizedNet:
    """What BN statistics give without any picture: ranges of mean plus six deviations, weights rounded to nearest.

    The sum of a block's branches has the mean Σβ and, if they vary together, at most the deviation Σ|γ|.
    """
    lowest, highest = (float(v) for v in pixel_range(PREPROCESSING))
    reach = max(-lowest, highest)
    layers: dict[str, LayerIntegers] = {}
    for (name, block), trained in zip(fused_blocks(fused), net.blocks(), strict=True):
        layers[name] = round_layer(block.conv, reach / 127)
        reach = float(upper_bound(cast(TrainingBlock, trained)).amax())
    layers[CLASSIFIER] = round_layer(fused.classifier, reach / 127)
    return QuantizedNet(fused, Reconstruction(layers, reach / 127))


def upper_bound(block: TrainingBlock) -> Tensor:
    """Mean plus six deviations of each channel of a block's sum."""
    norms = [block.bn] if block.bn is not None else [m for m in block.modules() if isinstance(m, _BatchNorm)]
    mean = torch.stack([cast(Tensor, norm.bias) for norm in norms]).sum(0)
    deviation = torch.stack([cast(Tensor, norm.weight).abs() for norm in norms]).sum(0)
    return mean + _DEVIATIONS * deviation


def round_layer(layer: nn.Conv2d | nn.Linear, scale: float) -> LayerIntegers:
    """The integers of a layer, rounded to nearest with the scales of least error."""
    rows, taps = layer.weight.flatten(1), count_taps(layer.weight)
    scales = choose_weight_scales(rows, taps)
    integers = round_weights(rows, scales, taps).reshape(layer.weight.shape).to(torch.int8)
    return LayerIntegers(integers, scales, cast(Tensor, layer.bias), scale)


def pixel_range(preprocessing: Preprocessing) -> tuple[float, float]:
    """The smallest and the largest normalized value of any channel."""
    pairs = list(zip(preprocessing.mean, preprocessing.std, strict=True))
    return min(-m / s for m, s in pairs), max((1 - m) / s for m, s in pairs)


def cpu_timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What `function` returns, and the CPU seconds it took, which other work on the machine does not change much."""
    start = time.process_time()
    result = function()
    return result, round(time.process_time() - start, 1)


def threads() -> int:
    """Of torch."""
    return torch.get_num_threads()


if __name__ == "__main__":
    main()
