"""The command `predict`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from repvgg_deploy.cli.command import Command, Outcome, option_group, show_progress
from repvgg_deploy.cli.model_options import image_run_options, model_options, take_model
from repvgg_deploy.cli.options import output_options, path_argument, take_decoding, take_ray
from repvgg_deploy.cli.startup import share_cores

if TYPE_CHECKING:
    from repvgg_deploy.progress import Progress
    from repvgg_deploy.serving import PredictorSpec
    from repvgg_deploy.serving.ray_cluster import RayOptions
    from repvgg_deploy.workflows.predict import PredictRequest, PredictSummary


@click.command(
    cls=Command,
    examples=(
        "repvgg-deploy predict net.fp16.onnx photos/ -o classes.jsonl",
        "repvgg-deploy predict net.plan 'shards/*.tar' -o classes.parquet --topk 1 --resume",
        "find . -name '*.jpg' | repvgg-deploy predict net.pth - --size 256",
    ),
)
@path_argument("model")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@image_run_options
@model_options
@option_group(
    "Output",
    click.option(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="File to write: .jsonl, .csv or .parquet; - prints lines of JSON to stdout.",
    ),
    click.option("--topk", type=click.IntRange(min=1), default=5, metavar="K", help="Number of classes per image."),
    click.option("--logits", "extra", flag_value="logits", help="Also the logits of all classes."),
    click.option("--features", "extra", flag_value="features", help="Also the pooled features, if MODEL has them."),
    click.option("--resume", is_flag=True, help="Continue an interrupted run of the same command."),
)
@output_options
def predict(
    model: Path, images: tuple[str, ...], output: str, resume: bool, strict: bool, **options: Any
) -> Any:  # fmt: skip
    """Write the classes of images, one row per image.

    IMAGES are folders with everything below them, quoted patterns, tar archives or WebDataset shards, text files with
    one path per line, image files, or - for paths on standard input. MODEL is a checkpoint, an ONNX graph or an
    engine. A row has the image's path, and its best classes with names and scores, or an error.

    FILE appears when all rows are there; until then FILE.partial keeps the finished ones for --resume. With --ray it
    is a folder of Parquet files.
    """
    share_cores()
    from repvgg_deploy.workflows.predict import PredictRequest, print_predictions

    session_json = click.get_current_context().find_root().obj.as_json
    if output == "-" and (resume or session_json):
        raise click.UsageError("--resume and --json are for -o FILE; without it the rows themselves are printed.")
    cluster = take_ray(options)
    if cluster is not None and (output == "-" or resume):
        raise click.UsageError("--ray needs -o DIR, and has no --resume: the cluster itself tries again.")
    request = PredictRequest(take_spec(model, options), images, Path(output), resume, strict)
    with show_progress() as progress:
        summary = None if output == "-" else _run(request, cluster, progress)
        broken = print_predictions(request, sys.stdout.write, progress) if summary is None else summary.broken
        if broken:
            rows = "image could not be read; its row" if broken == 1 else "images could not be read; each of their rows"
            progress.note(f"warning: {broken:,} {rows} contains the error")
    if summary is None:
        return Outcome({}, lambda: None)
    return Outcome(summary.to_dict(), lambda: _show(summary))


def _run(request: PredictRequest, cluster: RayOptions | None, progress: Progress) -> PredictSummary:
    if cluster is None:
        from repvgg_deploy.workflows.predict import predict_to_file

        return predict_to_file(request, progress)
    from repvgg_deploy.workflows.on_ray import predict_on_ray

    return predict_on_ray(request, cluster, progress)


def _show(summary: PredictSummary) -> None:
    from repvgg_deploy.cli.tables import print_fields

    speed = summary.images_per_sec
    print_fields(
        {
            "file": summary.file,
            "run by": f"{summary.backend}, {summary.precision}",
            "images": summary.images,
            "with an error": summary.broken or None,
            "from before": summary.resumed or None,
            "speed": None if speed is None else f"{speed:,.1f} images/s, decoding included",
        }
    )


def take_spec(model: Path, options: dict[str, Any]) -> PredictorSpec:
    """Remove the options of the model and of its predictions from `options` and return them as one object."""
    from repvgg_deploy.serving import PredictOptions, PredictorSpec

    wanted = PredictOptions(
        options.pop("topk"), options.pop("extra") or "classes", options.pop("batch"), take_decoding(options)
    )
    return PredictorSpec(model, **take_model(options), options=wanted, **options)
