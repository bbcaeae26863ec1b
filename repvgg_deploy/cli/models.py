"""The commands that look at models: `inspect`, `archs`, `verify` and `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from repvgg_deploy.cli.command import Command, Outcome, option_group, show_progress
from repvgg_deploy.cli.model_options import image_run_options, model_options, take_model
from repvgg_deploy.cli.options import (
    PATH,
    checkpoint_options,
    junit_option,
    output_options,
    path_argument,
    take_checkpoint,
    take_decoding,
    take_ray,
)
from repvgg_deploy.cli.startup import share_cores
from repvgg_deploy.errors import LimitCheck, ThresholdError, first_failure

if TYPE_CHECKING:
    from repvgg_deploy.workflows.evaluate import Evaluation


@click.command(
    cls=Command,
    examples=("repvgg-deploy inspect net.pth", "repvgg-deploy inspect net.fp16.onnx --json"),
)
@path_argument("file")
@checkpoint_options
@output_options
def inspect(file: Path, **options: Any) -> Any:
    """Describe a checkpoint, an ONNX graph or an engine."""
    from repvgg_deploy.cli.tables import print_description
    from repvgg_deploy.files.kinds import file_kind
    from repvgg_deploy.workflows.inspect import inspect_checkpoint, inspect_file

    if file_kind(file) == "checkpoint":
        description = inspect_checkpoint(file, take_checkpoint(options))
    else:
        description = inspect_file(file, options["arch"])
    return Outcome(description, lambda: print_description(description))


@click.command(cls=Command, examples=("repvgg-deploy archs",))
@output_options
def archs() -> Any:
    """List the known architectures, with their published accuracy."""
    from repvgg_deploy.cli.tables import print_archs
    from repvgg_deploy.nets.cards import load_cards
    from repvgg_deploy.workflows.inspect import describe_card

    rows = [describe_card(card) for card in load_cards().values()]
    return Outcome({"archs": rows}, lambda: print_archs(rows))


@click.command(
    cls=Command,
    examples=(
        "repvgg-deploy verify net.pth net.fp16.onnx",
        "repvgg-deploy verify net.pth net.int8.onnx --data images/ --max-relative 0.1 --max-disagreement 5",
    ),
)
@path_argument("a")
@path_argument("b")
@option_group(
    "Input",
    click.option("--data", type=PATH, metavar="DIR", help="Images to compare on.  [default: 16 synthetic images]"),
    click.option("--count", type=click.IntRange(min=1), metavar="N", help="Limit on the number of images of --data."),
)
@model_options
@option_group(
    "Limits",
    click.option("--max-relative", type=float, metavar="R",
                 help="Largest relative difference.  [default: by the coarser precision of the two]"),
    click.option("--max-abs", type=float, metavar="X", help="Largest difference of a logit."),
    click.option("--max-disagreement", type=float, metavar="P", help="Largest share of other top-1 classes, percent."),
)  # fmt: skip
@junit_option
@output_options
def verify(a: Path, b: Path, **options: Any) -> Any:
    """Compare the outputs of two models; fail if they differ by more than the tolerance.

    A and B are checkpoints, ONNX graphs or engines. Both get the same images, prepared as the metadata of an exported
    graph say, or else as the card of the architecture does.
    """
    share_cores()
    from repvgg_deploy.cli.tables import print_comparison
    from repvgg_deploy.verification.models import Tolerance, VerifyOptions, compare_models

    if options["count"] is not None and options["data"] is None:
        raise click.UsageError("--count is for --data DIR.")
    tolerance = Tolerance(options.pop("max_relative"), options.pop("max_abs"), options.pop("max_disagreement"))
    how = VerifyOptions(tolerance, **take_model(options), **options)
    with show_progress() as progress:
        parity, checks = compare_models(a, b, how, progress)
    values = {"a": str(a), "b": str(b), **parity.to_dict()}
    return Outcome(values, lambda: print_comparison(values), first_failure(checks), checks=checks)


@click.command(
    "eval",
    cls=Command,
    examples=(
        "repvgg-deploy eval net.int8.onnx --data val/",
        "repvgg-deploy eval net.pth --data val/ --size 256 --min-top1 72",
    ),
)
@path_argument("model")
@option_group(
    "Input",
    click.option("--data", type=PATH, required=True, metavar="DIR",
                 help="Labeled images: DIR/<class>/*.jpg, or tar archives."),
    click.option("--ground-truth", type=PATH, metavar="FILE", help="Classes of a flat folder: `NAME CLASS` lines."),
)  # fmt: skip
@image_run_options
@model_options
@option_group("Limits", click.option("--min-top1", type=float, metavar="P", help="Smallest top-1, percent."))
@junit_option
@output_options
def eval_(model: Path, data: Path, batch: int, strict: bool, min_top1: float | None, **options: Any) -> Any:
    """Measure top-1 and top-5 accuracy of a model on a folder of images.

    Each folder in DIR is one class. They are matched with the model's class names if it has them, else taken in sorted
    order. DIR may also be a tar archive or a quoted pattern of them, read without unpacking: ImageNet's, with folders
    or one archive per class, or WebDataset shards with .cls members. A flat folder or archive, such as ImageNet's
    validation set, needs --ground-truth.
    """
    share_cores()
    from repvgg_deploy.cli.tables import print_evaluation
    from repvgg_deploy.runtime.model import open_model
    from repvgg_deploy.workflows.evaluate import EvaluationOptions, evaluate

    ground_truth, cluster = options.pop("ground_truth"), take_ray(options)
    decoding, opening = take_decoding(options), take_model(options)
    with show_progress() as progress:
        if cluster is not None:
            from repvgg_deploy.serving import PredictOptions, PredictorSpec
            from repvgg_deploy.workflows.on_ray import RayEvaluationRequest, evaluate_on_ray

            wanted = PredictOptions(batch=batch, decoding=decoding)
            spec = PredictorSpec(model, **opening, options=wanted)
            result = evaluate_on_ray(RayEvaluationRequest(spec, data, ground_truth, strict), cluster, progress)
        else:
            opened = open_model(model, **opening)
            for note in opened.notes:
                progress.note(f"note: {note}")
            result = evaluate(opened, data, batch, strict, progress, EvaluationOptions(ground_truth, decoding))
        for path, reason in result.broken.items():
            progress.note(f"warning: left out: {reason if path in reason else f'{path}: {reason}'}")
    checks = () if min_top1 is None else (_check_top1(result, min_top1),)
    return Outcome(result.to_dict(), lambda: print_evaluation(result), first_failure(checks), checks=checks)


def _check_top1(result: Evaluation, least: float) -> LimitCheck:
    failure = ThresholdError(
        f"top-1 is {result.top1:.2f} %, below --min-top1 {least:g}",
        "check the preprocessing and the order of the classes with `inspect`",
    )
    name = f"{Path(result.model).name}: top-1 in percent, --min-top1"
    return LimitCheck(name, result.top1, least, None if result.top1 >= least else failure)
