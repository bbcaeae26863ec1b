"""Quantization-aware training where post-training quantization fails, and at plain INT8: what it wins back.

    python bench/qat.py --checkpoint CKPT --calib DIR --val DIR [--case 6-bit …] [--steps N] [-o bench/results]

Cases: `int8` (8 bits, one scale per filter, from the recipe's export), `int8 full-range` (activations after a ReLU up
to 255, for ONNX Runtime and OpenVINO), `per-tensor` (8 bits, one weight scale per
layer), `6-bit` (weights and activations), `6-bit per-tensor`, `4-bit per-tensor`. Three states are measured: the
plainest post-training quantization, of the fused net with the ranges of the largest values, rounded to nearest; the
start of the training, which is the export by the recipe to the integers of the case; and the end, the best state by the
images that are held out of the training. What is learned are the float net's answers on the calibration images, without
labels unless --label-weight is given. A record and the learning curves are written per case. Figures are of
the simulated net, integer for integer what ONNX Runtime computes at 8 bits. `docs/figures/qat_curves.png` is the curve
of `6-bit`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from int8_bench.setup import PREPROCESSING, Floats, compare, in_batches, read_validation, run_torch, write_record
from numpy.typing import NDArray
from torch import nn

from repvgg_deploy.benchmark.report.curves import draw_curves
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization import load_recipe
from repvgg_deploy.quantization.calibration_images import choose_images
from repvgg_deploy.quantization.points import POOL, Images, layer_names
from repvgg_deploy.quantization.qat import LayerScales, QatOptions, QatScales, prepare_qat
from repvgg_deploy.quantization.qat_best import BestState
from repvgg_deploy.quantization.qat_start import start_training
from repvgg_deploy.quantization.qat_training import QatTraining, TrainingOptions, set_saturation
from repvgg_deploy.quantization.statistics import collect_statistics
from repvgg_deploy.quantization.target import UNSIGNED_HIGHEST
from repvgg_deploy.workflows.qat_images import KnownClasses, hold_out, image_limits, read_training_images

CASES = {
    "int8": QatOptions(),
    "int8 full-range": QatOptions(full_range=True),
    "per-tensor": QatOptions(per_tensor=True),
    "6-bit": QatOptions(weight_bits=6, activation_bits=6),
    "6-bit per-tensor": QatOptions(weight_bits=6, activation_bits=6, per_tensor=True),
    "4-bit per-tensor": QatOptions(weight_bits=4, activation_bits=4, per_tensor=True),
}
_POINTS = 6


def main() -> None:
    """Train every case, and write its record and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True, help="images to calibrate and train on")
    parser.add_argument("--val", type=Path, required=True, help="labelled images: DIR/<class>/*")
    parser.add_argument("--images", type=int, help="of the validation images at the end; all by default")
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--recipe", default="accurate")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=TrainingOptions.rate)
    parser.add_argument("--label-weight", type=float, default=0.0, help="of the labels of --calib DIR/<class>/")
    parser.add_argument("--seed", type=int, action="append", help="of a run; several begin from the same start")
    parser.add_argument("--name", help="of the record, after qat-; by default the case")
    parser.add_argument("--minutes", type=float, help="of CPU time; the run ends there, its rate not yet at 0")
    parser.add_argument("--note", help="of the machine: what else it did")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "TF32 acceleration")
    for case in arguments.case or CASES:
        run_case(case, arguments)


def run_case(case: str, arguments: argparse.Namespace) -> None:
    """Train one case and write what came of it."""
    net = build(load_checkpoint(arguments.checkpoint))
    recipe = load_recipe(arguments.recipe)
    calibration = choose_images(arguments.calib, recipe.count, recipe.seed, PREPROCESSING)
    images, labels = read_validation(arguments.val, arguments.images)
    plain = measure_plain(net, calibration, CASES[case], images, labels)
    print(case, plain, flush=True)
    begin = time.process_time()
    start = start_training(net, calibration, recipe, CASES[case])
    start_cpu_s = time.process_time() - begin
    exact = run_torch(start.teacher, images)
    name = f"qat-{(arguments.name or case).replace(' ', '-')}"
    before = measure(start.student, images, labels, exact)
    results = [plain, {"when": "before training", "cpu_s": round(start_cpu_s, 1), **before}]
    print(case, results[-1], flush=True)
    curves: list[Path] = []
    for seed in arguments.seed or [0]:
        options = TrainingOptions(arguments.steps, arguments.batch, arguments.rate, seed=seed)
        options = replace(options, labels=arguments.label_weight)
        training = QatTraining(copy.deepcopy(start.student), start.teacher, options)
        curves.append(arguments.output / f"{name}{f'-{seed}' if seed else ''}.curves.csv")
        results.append(train(training, arguments, curves[-1], (images, labels, exact)))
        print(case, results[-1], flush=True)
    lost, begun, *ends = (100 - float(row["agreement"]) for row in results)
    left = statistics.mean(ends)
    about: dict[str, Any] = {
        "won_back_percent": won_back(lost, left),
        "won_back_by_training_percent": won_back(begun, left),
        "options": asdict(CASES[case]),
        "recipe": recipe.name,
        "batch": arguments.batch,
        "rate": arguments.rate,
        "label_weight": arguments.label_weight,
        "steps_planned": arguments.steps,
        "note": arguments.note,
        "torch_threads": torch.get_num_threads(),
    }
    write_record(arguments.output, name, results, **about)
    for path in curves:
        draw_curves(path)


def won_back(lost: float, left: float) -> float | None:
    """The share of the lost agreement, in percent; None where nothing was lost."""
    return round(100 * (1 - left / lost), 1) if lost else None


def train(
    training: QatTraining, arguments: argparse.Namespace, curves: Path, validation: tuple[Floats, Any, Floats]
) -> dict[str, Any]:
    """Take the steps, writing the curves as they grow; the figures at the end."""
    images, labels, exact = validation
    classes = KnownClasses(exact.shape[1]) if arguments.label_weight else None
    data = hold_out(read_training_images(arguments.calib, PREPROCESSING, None, classes))
    best, limits = BestState(data.held_out, data.held_out_labels), image_limits(PREPROCESSING)
    some = slice(None, None, max(1, len(images) // 500))
    rows: list[dict[str, Any]] = []
    begin, measured = time.process_time(), 0.0
    every = -(-arguments.steps // _POINTS)
    over = False
    while not over:
        if rows:
            training.step(data.take, len(data), limits)
        cpu = time.process_time() - begin - measured
        over = training.done >= arguments.steps or (arguments.minutes is not None and cpu > 60 * arguments.minutes)
        if training.done % every == 0 or over:
            values = {**(training.means() if training.done else {}), **best.offer(training)}
            before = time.process_time()
            followed = _followed(measure(training.student, images[some], labels[some], exact[some]))
            measured += time.process_time() - before
            values = {name: round(value, 4) for name, value in values.items()}
            rows.append({"step": training.done, **values, "cpu_s": round(cpu, 1), **followed})
            print(rows[-1], flush=True)
            _write_rows(rows, curves)
    best.put_into(training)
    figures = measure(training.student, images, labels, exact)
    return {
        "when": "after training",
        "seed": training.options.seed,
        "steps": training.done,
        "best_step": best.step,
        "cpu_s": round(time.process_time() - begin - measured, 1),
        "images_seen": len(data),
        "images_held_out": len(data.held_out),
        **figures,
    }


def measure_plain(
    net: RepVGG, calibration: Images, options: QatOptions, images: Floats, labels: NDArray[np.int64]
) -> dict[str, Any]:
    """The figures of the plainest post-training quantization: all ranges reach to the largest value."""
    fused = fuse(net, torch.float32).eval().requires_grad_(False)
    points = collect_statistics(fused, calibration).points
    levels = 2 ** (options.weight_bits - 1) - 1

    def reach(name: str) -> float:
        point = points[name]
        unsigned = float(point.lowest.min()) >= 0
        highest = UNSIGNED_HIGHEST if unsigned and options.full_range else options.highest(unsigned)
        return float(point.largest.max()) / highest

    layers: dict[str, LayerScales] = {}
    for name in layer_names(fused):
        layer: Any = fused.get_submodule(name)
        weight = (layer.conv if hasattr(layer, "conv") else layer).weight
        layers[name] = LayerScales(weight.flatten(1).abs().amax(1).clamp_min(1e-30) / levels, reach(name))
    student = prepare_qat(net, QatScales(layers, reach(POOL)), options)
    figures = measure(student, images, labels, run_torch(fused, images))
    return {"when": "plain post-training quantization", **figures}


def measure(student: nn.Module, images: Floats, labels: NDArray[np.int64], exact: Floats) -> dict[str, Any]:
    """The figures of the student as ONNX Runtime computes it."""
    set_saturation(student, UNSIGNED_HIGHEST)
    student.eval()
    logits = np.concatenate([run_torch(student, batch) for batch in in_batches(images, 200)])
    student.train()
    return asdict(compare(logits, exact, labels))


def _followed(figures: dict[str, Any]) -> dict[str, Any]:
    return {"val_top1": figures["top1"], "val_agreement": figures["agreement"], "val_sqnr_db": figures["sqnr_db"]}


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
