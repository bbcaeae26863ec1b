"""INT8 on other nets, no setting changed: the demo model, planted faults in it, small nets of every kind, checkpoints.

    python bench/int8.py nets --checkpoints FOLDER -o bench/results

Calibration and evaluation images are drawn (`repvgg_deploy.images.synthetic`) with seeds that no net was trained or
measured on. The small nets are trained here first, as the demo model was but not as long. Each net is held against its
own float32 form: this project's recipes and ONNX Runtime's own quantizer (per-channel, min-max), both in ONNX Runtime.
Top-1 means nothing for the checkpoints, which have never seen these classes.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from int8_bench.faults import CASES, USUAL_CASES
from int8_bench.options import COUNT, FOLDER, count_option, output_option, recipes_option
from int8_bench.setup import (
    PIXELS,
    PREPROCESSING,
    Floats,
    compare,
    load_fused,
    run_onnx,
    run_ours,
    run_torch,
    timed,
    write_record,
)
from int8_bench.tools import quantize_onnxruntime
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.images.synthetic import draw_images
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.spec import ArchSpec, BlockSpec, SqueezeExcite, training_branches

CALIBRATION_SEED, EVALUATION_SEED, TRAINING_SEED, HELD_OUT_SEED = 31, 32, 33, 34
TRAINING_IMAGES, EPOCHS = 8000, 10
SMALL_NETS: dict[str, dict[str, Any]] = {
    "width 8": {"width": 8},
    "groups 4": {"groups": 4},
    "squeeze-excite": {"squeeze_excite": True},
}


@cache
def load_trainer() -> tuple[Any, Any, Any]:
    """The demo model's trainer, and drawn pictures with labels to train on and to follow it with."""
    sys.path.append(str(data_folder("models")))
    trainer = import_module("train_demo")
    with ProcessPoolExecutor() as pool:
        train_set = trainer.draw_set(pool, TRAINING_IMAGES, TRAINING_SEED, PIXELS)
        return trainer, train_set, trainer.draw_set(pool, 1000, HELD_OUT_SEED, PIXELS)


def train_small(**options: Any) -> RepVGG:
    """A fused net of the demo model's depth, trained as it was on fewer pictures and for fewer epochs."""
    trainer, train_set, held_out = load_trainer()
    torch.manual_seed(0)
    spec = find_card("demo").spec()
    net = RepVGG(ArchSpec(tuple(tuple(stage) for stage in _change(spec, **options)), spec.classes))
    # oneDNN in torch 2.13 crashes in the gradient of a strided 1x1 convolution of 8 channels (AVX-512).
    # Torch mentions TF32 when it is switched off.
    warnings.filterwarnings("ignore", "TF32 acceleration")
    with torch.backends.mkldnn.flags(enabled=False):
        trainer.train_net(net, train_set, held_out, PREPROCESSING, EPOCHS)
    fused = fuse(net.eval(), torch.float32)
    assert isinstance(fused, RepVGG)
    return fused.eval().requires_grad_(False)


def _change(
    spec: ArchSpec, width: int | None = None, groups: int = 1, squeeze_excite: bool = False
) -> list[list[BlockSpec]]:
    stages = []
    for stage in spec.stages:
        changed = []
        for index, block in enumerate(stage):
            inputs = width if width and block.in_channels != spec.in_channels else block.in_channels
            outputs = width or block.out_channels
            hidden = SqueezeExcite(max(4, outputs // 4)) if squeeze_excite else None
            new = BlockSpec(inputs, outputs, block.stride, groups if index % 2 else 1, (), False, hidden)
            changed.append(replace(new, branches=training_branches(new)))
        stages.append(changed)
    return stages


def collect_nets(checkpoints: Path | None, calibration: Floats) -> dict[str, Callable[[], RepVGG]]:
    """What makes each net of the table, fused, by name."""
    demo = load_fused(data_folder("models") / "demo.safetensors")
    makers: dict[str, Callable[[], RepVGG]] = {}
    makers.update({f"demo: {case}": partial(CASES[case], demo, calibration) for case in USUAL_CASES})
    makers.update({name: partial(train_small, **options) for name, options in SMALL_NETS.items()})
    if checkpoints is not None:
        paths = sorted(p for p in checkpoints.iterdir() if p.suffix in (".pth", ".tar", ".safetensors"))
        makers.update({path.name: partial(load_fused, path) for path in paths})
    return makers


def run_recipe(net: RepVGG, recipe: str, calibration: Floats, images: Floats) -> Floats:
    """The logits of `net` as a recipe quantizes it, or ONNX Runtime's own quantizer for the recipe `onnxruntime`."""
    if recipe != "onnxruntime":
        return run_ours(net, recipe, calibration, images)[0]["onnxruntime"]
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        write_graph(to_onnx(net, FloatLayers(), GraphOptions(PIXELS, PIXELS), {}), source)
        quantize_onnxruntime(source, "minmax", True, calibration, target)
        return run_onnx(target, images)


def describe(exact: Floats) -> dict[str, Any]:
    """How much room a net leaves: the median lead of its first class, in shares of the logits' size in that image."""
    best = np.sort(exact.astype(np.float64), axis=1)
    lead = np.median((best[:, -1] - best[:, -2]) / np.sqrt((best**2).mean(1)))
    energy = (best**2).sum(1)
    return {
        "median_lead": round(float(lead), 3),
        "classes_seen": len(np.unique(exact.argmax(1))),
        "strongest_over_median_energy": round(float(energy.max() / np.median(energy)), 1),
    }


@click.command()
@click.option("--checkpoints", type=FOLDER, metavar="DIR", help="A folder of further checkpoints.")
@count_option
@click.option("--only", multiple=True, metavar="PART", help="Part of the names of the nets to measure; repeatable.")
@click.option(
    "--images", "image_count", type=COUNT, default=2000, show_default=True, metavar="N", help="Evaluation images."
)
@recipes_option("fast", "accurate", "onnxruntime")
@output_option
def nets(
    checkpoints: Path | None, count: int, only: Sequence[str], image_count: int, recipes: Sequence[str], output: Path
) -> None:
    """The recipes and ONNX Runtime's own quantizer on other nets."""
    calibration = normalize(draw_images(count, CALIBRATION_SEED)[0], PREPROCESSING)
    pixels, labels = draw_images(image_count, EVALUATION_SEED)
    images = normalize(pixels, PREPROCESSING)
    results = []
    for name, make in collect_nets(checkpoints, calibration).items():
        if only and not any(part in name for part in only):
            continue
        net = make()
        exact = run_torch(net, images)
        for recipe in recipes:
            logits, seconds = timed(partial(run_recipe, net, recipe, calibration, images))
            row = {"net": name, "recipe": recipe, "seconds": seconds}
            results.append({**row, **asdict(compare(logits, exact, labels)), **describe(exact)})
            print(results[-1], flush=True)
    seeds = {"calibration": CALIBRATION_SEED, "evaluation": EVALUATION_SEED, "training of small nets": TRAINING_SEED}
    path = write_record(output, "int8-nets", results, calibration_images=count, drawn_seeds=seeds)
    print(f"written {path}")
