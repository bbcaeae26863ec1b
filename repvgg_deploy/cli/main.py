"""The command line: options in, one call, output out."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from repvgg_deploy import __version__
from repvgg_deploy.cli.bench import bench, report_
from repvgg_deploy.cli.options import (
    FiniteRange,
    checkpoint_options,
    decoding_options,
    engine_options,
    graph_options,
    int8_options,
    integers_option,
    json_option,
    path_argument,
    preprocessing_options,
    read_labels,
    take_build,
    take_decoding,
    take_exact_integers,
    take_int8,
    take_preprocessing,
    trust_option,
)
from repvgg_deploy.cli.progress import show_progress
from repvgg_deploy.cli.signals import raise_signals
from repvgg_deploy.cli.startup import prepare_process, quick_imports
from repvgg_deploy.errors import DeployError, ThresholdError, VerificationError


class _Group(click.Group):
    """The one place that prints an error a user can mend; anything else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            # SIGTERM is what ends a container or a CI job: like Ctrl-C it removes what was begun on the disk.
            with raise_signals():
                return self._invoke(ctx)
        except KeyboardInterrupt:
            # As click does, but with the status that a shell expects. The blank line closes the terminal's `^C`.
            click.echo("\nAborted!", err=True)
            ctx.exit(128 + signal.SIGINT)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DeployError as error:
            click.echo(f"error: {error.message}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="repvgg-deploy")
def main() -> None:
    """Deployment compiler for RepVGG image classifiers.

    A checkpoint of any library goes in; a verified, simplified ONNX graph and a TensorRT engine come out.
    """


@main.command()
@path_argument("ckpt")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(), metavar="DIR", help="Where to write.")
@click.option("--fp16", is_flag=True, help="A float16 graph.")
@click.option("--int8", is_flag=True, help="An INT8 graph; needs --calib.")
@int8_options
@graph_options
@engine_options
@click.option("--bn-eps", type=FiniteRange(min=0, min_open=True), default=1e-5, help="The BNs' epsilon [1e-05].")
@click.option("--verify-data", type=click.Path(path_type=Path), metavar="DIR", help="Images to verify on.")
@click.option("--verify-full", is_flag=True, help="Verify every stage at full size on 16 images.")
@checkpoint_options
@preprocessing_options
@json_option
def export(
    ckpt: Path, output: Path, fp16: bool, int8: bool, layers: bool, labels: Path | None, as_json: bool, **options: Any
) -> None:
    """Write the verified, simplified ONNX graph of a checkpoint, and an engine where one can be built.

    The files are DIR/<checkpoint stem>.<precision>.onnx, .plan and .plan.json. Each stage is compared with the one
    before on real inputs; where they differ nothing is written.
    """
    if fp16 and int8:
        raise click.UsageError("--fp16 and --int8 exclude each other; --rest fp16 is what stays float in INT8.")
    prepare_process()
    with quick_imports():
        from repvgg_deploy.artifacts import Precision
        from repvgg_deploy.cli import output as report
        from repvgg_deploy.workflows.export import export as run_export
        from repvgg_deploy.workflows.export_request import ExportRequest

    precision = Precision.INT8 if int8 else Precision.FP16 if fp16 else Precision.FP32
    request = ExportRequest(
        checkpoint=ckpt,
        output=output,
        precision=precision,
        int8=take_int8(options, wanted=int8),
        build=take_build(options),
        io=Precision(options.pop("io")),
        class_names=read_labels(labels),
        preprocessing=take_preprocessing(options),
        **options,
    )
    with show_progress() as progress:
        result = run_export(request, progress)
    if as_json:
        report.print_json(result.to_dict())
    else:
        report.print_export(result, layers)


@main.command()
@path_argument("ckpt")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="What to write.")
@click.option(
    "--layout",
    type=click.Choice(["official", "timm"]),
    help="Whose names; timm for a checkpoint from timm, else official.",
)
@click.option("--bn-eps", type=FiniteRange(min=0, min_open=True), default=1e-5, help="The BNs' epsilon [1e-05].")
@checkpoint_options
@json_option
def fuse(ckpt: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Write a checkpoint's deploy form, for the official code or timm to load."""
    from repvgg_deploy.cli import output as report
    from repvgg_deploy.workflows.fuse_checkpoint import write_fused

    written = write_fused(ckpt, output, **options)
    values = {
        "file": str(written.path),
        "arch": written.arch,
        "layout": written.layout,
        "parameters": written.parameters,
        "parity": written.parity.to_dict(),
    }
    if as_json:
        report.print_json(values)
    else:
        report.print_fields(values)


@main.command()
@path_argument("file")
@checkpoint_options
@json_option
def inspect(file: Path, as_json: bool, **options: Any) -> None:
    """Say what a checkpoint, an ONNX graph or an engine is."""
    from repvgg_deploy.cli import output as report
    from repvgg_deploy.workflows.inspect import inspect_file

    description = inspect_file(file, **options)
    if as_json:
        report.print_json(description)
    else:
        labels = {"flops": "multiply-adds", "flops_deploy": "multiply-adds deploy", "input_size": "height, width px"}
        report.print_fields({labels.get(name, name): value for name, value in description.items()})


@main.command()
@json_option
def archs(as_json: bool) -> None:
    """List the architectures that have a card."""
    from repvgg_deploy.cli import output as report
    from repvgg_deploy.nets.cards import load_cards
    from repvgg_deploy.workflows.inspect import describe_card

    rows = [describe_card(card) for card in load_cards().values()]
    if as_json:
        report.print_json({"archs": rows})
        return
    columns = [
        "arch",
        "blocks",
        "widths",
        "groups",
        "params train M",
        "deploy M",
        "size",
        "FLOPs train G",
        "deploy G",
        "top-1 %",
    ]
    table = [
        [
            row["arch"],
            ",".join(map(str, row["blocks"])),
            ",".join(map(str, row["widths"])),
            row["groups"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['parameters_deploy'] / 1e6:.2f}",
            row["input_size"],
            f"{row['flops'] / 1e9:.2f}",
            f"{row['flops_deploy'] / 1e9:.2f}",
            "–" if row["top1"] is None else f"{row['top1']:.2f}",
        ]
        for row in rows
    ]
    report.print_table(columns, table)


@main.command()
@path_argument("a")
@path_argument("b")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Images; drawn ones by default.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="At most N images of DIR.")
@click.option("--max-relative", type=float, metavar="R", help="Fail beyond; by default by the models' precision.")
@click.option("--max-abs", type=float, metavar="X", help="Fail beyond this difference of a logit.")
@click.option("--max-disagreement", type=float, metavar="P", help="Fail beyond P percent other top-1 classes.")
@checkpoint_options
@preprocessing_options
@integers_option
@trust_option
@json_option
def verify(a: Path, b: Path, as_json: bool, **options: Any) -> None:
    """Compare the outputs of two models, and fail beyond the tolerance.

    A and B are checkpoints, ONNX graphs or engines. Both get the same images, prepared as the metadata of an exported
    graph say, or else the architecture's card.
    """
    from repvgg_deploy.cli import output as report
    from repvgg_deploy.verification.models import Tolerance, verify_models

    if options["count"] is not None and options["data"] is None:
        raise click.UsageError("--count is for --data DIR.")
    tolerance = Tolerance(options.pop("max_relative"), options.pop("max_abs"), options.pop("max_disagreement"))
    preprocessing = take_preprocessing(options)
    exact = take_exact_integers(options)
    with show_progress() as progress:
        parity = verify_models(a, b, preprocessing, tolerance, **options, exact_integers=exact, progress=progress)
    values = {"a": str(a), "b": str(b), **parity.to_dict()}
    if as_json:
        report.print_json(values)
    else:
        report.print_fields(values)


@main.command(name="eval")
@path_argument("model")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, metavar="DIR", help="DIR/<class>/*.jpg, or tar archives."
)
@click.option(
    "--ground-truth",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Classes of a flat folder: `NAME CLASS` lines.",
)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Images a run.")
@click.option("--strict", is_flag=True, help="An image, folder or archive that cannot be read is an error.")
@click.option("--min-top1", type=float, metavar="P", help="Fail below P percent.")
@checkpoint_options
@preprocessing_options
@decoding_options
@integers_option
@trust_option
@json_option
def eval_(
    model: Path, data: Path, batch: int, strict: bool, min_top1: float | None, as_json: bool, **options: Any
) -> None:
    """Top-1 and top-5 accuracy of a model on a folder of images.

    Each folder in DIR is a class; their sorted order is that of the model's outputs. DIR may also be a tar archive or
    a quoted pattern of them, read without unpacking: ImageNet's, with folders or one archive per class, or WebDataset
    shards with .cls members. A flat folder or archive, as ImageNet's validation set, needs --ground-truth.
    """
    from repvgg_deploy.cli import output as report
    from repvgg_deploy.runtime.model import open_model
    from repvgg_deploy.workflows.evaluate import EvaluationOptions, evaluate

    preprocessing = take_preprocessing(options)
    settings = EvaluationOptions(options.pop("ground_truth"), take_decoding(options))
    opened = open_model(model, preprocessing, exact_integers=take_exact_integers(options), **options)
    with show_progress() as progress:
        for note in opened.notes:
            progress.note(f"note: {note}")
        result = evaluate(opened, data, batch, strict, progress, settings)
        for path, reason in result.broken.items():
            progress.note(f"left out: {reason if path in reason else f'{path}: {reason}'}")
    if as_json:
        report.print_json(result.to_dict())
    else:
        report.print_fields(
            {
                "model": result.model,
                "run by": f"{result.backend}, {result.precision}",
                "images": result.images,
                "left out": len(result.broken) or None,
                "top-1": f"{result.top1:.2f} %",
                "top-5": None if result.top5 is None else f"{result.top5:.2f} %",
                "speed": f"{result.images_per_sec:,.1f} images/s, decoding included",
            }
        )
    if min_top1 is not None and not result.top1 >= min_top1:
        raise ThresholdError(
            f"top-1 is {result.top1:.2f} %, below the {min_top1:g} % asked for",
            "look at the preprocessing and at the order of the classes: `inspect`",
        )


@main.command()
@path_argument("engine")
@path_argument("weights")
@json_option
def refit(engine: Path, weights: Path, as_json: bool) -> None:
    """Put new weights into a refittable engine, without a rebuild.

    WEIGHTS is a checkpoint of the engine's architecture, or an ONNX graph that was exported from one. The plan and its
    side file are replaced only once everything has worked.
    """
    from repvgg_deploy.cli import output as report
    from repvgg_deploy.workflows.refit import refit_in_place

    with show_progress() as progress:
        engine_files = refit_in_place(engine, weights, progress)
    values = {"engine": str(engine), "weights": str(weights), "sha256": engine_files.side.sha256}
    if as_json:
        report.print_json(values)
    else:
        report.print_fields(values)


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Keep the ONNX graphs there.")
@json_option
def demo(output: Path | None, as_json: bool) -> None:
    """The whole path on the embedded model, in about a minute, without a GPU."""
    from repvgg_deploy.cli import output as report
    from repvgg_deploy.workflows.demo import run_demo

    with show_progress() as progress:
        result = run_demo(output, progress)
    if as_json:
        report.print_json(result.to_dict())
        _require_all_forms(result.failures)
        return
    rows = [
        [
            row.form,
            f"{row.backend} {row.precision}",
            f"{row.top1:.2f}",
            f"{row.images_per_sec:,.0f}",
            f"{row.ratio:.2f}",
            "" if row.relative is None else f"{row.relative:.1e}",
            "" if row.megabytes is None else f"{row.megabytes:.2f}",
        ]
        for row in result.rows
    ]
    columns = ["form", "run by", "top-1 %", "images/s", "x training", "relative error", "MB"]
    report.print_table(columns, rows)
    click.echo(f"{result.images} drawn images, batch {result.batch}, {result.seconds:.0f} s in all")
    _require_all_forms(result.failures)


def _require_all_forms(failures: Mapping[str, str]) -> None:
    """Raise VerificationError if a form of the demo model could not be made."""
    if failures:
        reasons = "; ".join(f"{form}: {reason}" for form, reason in failures.items())
        raise VerificationError(f"not in the table: {reasons}", "`repvgg-deploy doctor` says what this machine can do")


@main.command()
@click.option("--require", multiple=True, metavar="PART", help="Fail where PART is not usable: tensorrt, gpu, …")
@json_option
def doctor(require: tuple[str, ...], as_json: bool) -> None:
    """Say what this machine can do, and what is missing for the rest."""
    from repvgg_deploy.cli import output as report
    from repvgg_deploy.workflows.doctor import probe_machine, require_parts

    rows = probe_machine()
    if as_json:
        report.print_json({"parts": [row.to_dict() for row in rows]})
    else:
        words = {True: "yes", False: "no", None: ""}
        table = [[r.part, r.version, words[r.can_build], words[r.can_run], r.detail, r.missing] for r in rows]
        report.print_table(["part", "version", "builds", "runs", "what", "missing"], table)
        for row in rows:
            if row.hint:
                click.echo(f"{row.part}: {row.hint}")
    require_parts(rows, require)


main.add_command(bench)
main.add_command(report_)
