"""The command `qat`: quantization-aware training on the equivalent kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from repvgg_deploy.cli.command import Command, Outcome, option_group, show_progress
from repvgg_deploy.cli.model_options import strict_option
from repvgg_deploy.cli.options import (
    PATH,
    checkpoint_options,
    output_options,
    path_argument,
    preprocessing_options,
    take_checkpoint,
    take_preprocessing,
)
from repvgg_deploy.cli.startup import share_cores
from repvgg_deploy.cli.types import RECIPE, FiniteRange


@click.command(
    cls=Command,
    examples=(
        "repvgg-deploy qat net.pth --data images/ --calib images/ --steps 1000 -o trained.safetensors",
        "repvgg-deploy export trained.safetensors --int8 --calib-cache trained.scales.npz",
        "torchrun --nproc-per-node 2 -m repvgg_deploy qat net.pth --data images/ --calib images/ --epochs 2 "
        "-o trained.pth --device cuda",
    ),
)
@path_argument("ckpt")
@checkpoint_options
@option_group(
    "Input",
    click.option("--data", type=PATH, required=True, metavar="DIR|none",
                 help="Images to train on, labeled or not; none: synthesized from BN statistics."),
    click.option("--calib", type=PATH, required=True, metavar="DIR|none",
                 help="Images for the initial scales; none: synthesized from BN statistics."),
    click.option("--val", type=PATH, metavar="DIR", help="Labeled validation images."),
    click.option("--from-deploy", is_flag=True,
                 help="Train a checkpoint in deploy form: batch norms are inserted, trained and fused again."),
)  # fmt: skip
@strict_option
@preprocessing_options
@option_group(
    "INT8",
    click.option("--recipe", type=RECIPE, default="accurate", metavar="NAME|FILE",
                 help="INT8 export to start from: fast, accurate, thorough, or a TOML file."),
    click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Steps to train.  [default: 1000]"),
    click.option("--epochs", type=click.IntRange(min=1), metavar="N",
                 help="Passes over the images, in place of steps."),
    click.option("--batch", type=click.IntRange(min=1), default=64, metavar="N",
                 help="Images per step, over all processes."),
    click.option("--rate", type=FiniteRange(min=0, min_open=True, max=1000), default=0.01, metavar="X",
                 help="Learning rate at the start, in steps of the weights' integers."),
    click.option("--label-weight", type=FiniteRange(min=0, max=1e6), default=0.0, metavar="X",
                 help="Weight of the labels of --data DIR/<class>/ relative to the float net's outputs."),
    click.option("--full-range", is_flag=True,
                 help="Activations after a ReLU up to 255 instead of 127: finer, for ONNX Runtime and OpenVINO only."),
    click.option("--bn", type=click.Choice(["frozen", "moving"]), default="frozen",
                 help="Running statistics of the batch norms: frozen, or updated from the quantized activations."),
    click.option("--seed", type=click.IntRange(min=0, max=(1 << 32) - 1), default=0, metavar="N",
                 help="Seed of all random numbers."),
    click.option("--mixed-precision", is_flag=True, help="Train in bfloat16 where the operator allows it."),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to train."),
)  # fmt: skip
@option_group(
    "Output",
    click.option("-o", "--output", type=PATH, required=True, metavar="FILE",
                 help="Checkpoint to write, by its ending; NAME.scales.npz and NAME.curves.csv, .png go beside it."),
    click.option("--interval", type=FiniteRange(min=0), default=60.0, metavar="S",
                 help="Seconds between saved states; a stopped run continues from the last one."),
)  # fmt: skip
@output_options
def qat(ckpt: Path, output: Path, **options: Any) -> Any:
    """Train a checkpoint for INT8, on the kernel that all branches of a block are together.

    The float net's own answers are what it learns, so unlabelled images do. The best state on images that are held out
    of the training is written, which may be the start. FILE is a checkpoint in training form again
    (in deploy form with --from-deploy), and NAME.scales.npz beside it what `export --int8 --calib-cache` takes. Run it
    again with the same options after a stop: it goes on, and ends as it would have ended.
    """
    share_cores()
    from repvgg_deploy.cli.tables import print_fields
    from repvgg_deploy.quantization.qat import QatOptions
    from repvgg_deploy.quantization.qat_training import TrainingOptions
    from repvgg_deploy.workflows.qat import run_qat
    from repvgg_deploy.workflows.qat_request import QatRequest

    if options["steps"] is not None and options["epochs"] is not None:
        raise click.UsageError("--steps and --epochs exclude each other.")
    if options["label_weight"] and options["data"] == Path("none"):
        raise click.UsageError("synthesized images have no labels: --label-weight needs --data DIR.")
    training = TrainingOptions(
        steps=options.pop("steps") or 1000,
        batch=options.pop("batch"),
        rate=options.pop("rate"),
        labels=options.pop("label_weight"),
        seed=options.pop("seed"),
        mixed_precision=options.pop("mixed_precision"),
    )
    request = QatRequest(
        checkpoint=ckpt,
        output=output,
        data=_folder(options.pop("data")),
        calibration=_folder(options.pop("calib")),
        validation=options.pop("val"),
        interval_s=options.pop("interval"),
        training=training,
        options=QatOptions(moving_statistics=options.pop("bn") == "moving", full_range=options.pop("full_range")),
        preprocessing=take_preprocessing(options),
        read=take_checkpoint(options),
        **options,
    )
    with show_progress() as progress:
        result = run_qat(request, progress)
        if result is None:
            # Another process of torchrun reports.
            click.get_current_context().exit(0)
    values = result.to_dict()
    fields = {name: value for name, value in values.items() if name not in ("start", "rows")}
    return Outcome(values, lambda: print_fields(fields))


def _folder(path: Path) -> Path | None:
    return None if path == Path("none") else path
