"""The commands that write models: `export`, `fuse` and `refit`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from repvgg_deploy.cli.command import Command, Outcome, option_group, show_progress
from repvgg_deploy.cli.config import config_options
from repvgg_deploy.cli.features import FeaturesCommand
from repvgg_deploy.cli.options import (
    PATH,
    checkpoint_options,
    engine_options,
    graph_options,
    int8_options,
    junit_option,
    output_options,
    path_argument,
    preprocessing_options,
    read_labels,
    take_build,
    take_checkpoint,
    take_graph,
    take_int8,
    take_preprocessing,
)
from repvgg_deploy.cli.pull import offline_option, pretrained_option, take_pretrained
from repvgg_deploy.cli.records import describe_records, records_input, records_output, take_records
from repvgg_deploy.cli.startup import prepare_process, quick_imports
from repvgg_deploy.cli.whole_networks import export_whole, leave_out_module_options, module_options
from repvgg_deploy.errors import LimitCheck
from repvgg_deploy.graphs.simplification import SimplificationCheck

if TYPE_CHECKING:
    from repvgg_deploy.workflows.export_all import ExportAllRequest
    from repvgg_deploy.workflows.export_request import ExportRequest
    from repvgg_deploy.workflows.export_result import CheckpointExportResult
    from repvgg_deploy.workflows.records import RecordsRequest


def _check_folder(_context: click.Context, _option: click.Parameter, folder: Path) -> Path:
    """Refuse the name of a file: it would become a folder of that name."""
    if folder.suffix in (".onnx", ".plan"):
        raise click.BadParameter(
            f"{folder} is the name of a file, and -o takes a folder: the files are named after the checkpoint,"
            f" net.fp32.onnx of net.pth. Write `-o {folder.parent}`."
        )
    return folder


@click.command(
    cls=FeaturesCommand,
    examples=(
        "repvgg-deploy export net.pth",
        "repvgg-deploy export net.pth --fp16 -o out --batch-range 1 8 64",
        "repvgg-deploy export net.pth --int8 --calib images/ -o out",
        "repvgg-deploy export net.pth --all --calib images/ --val val/ -o out",
        "repvgg-deploy export --arch B2 --pretrained openmmlab --fp16",
        "repvgg-deploy export net.pth --uint8-input --softmax --topk 5 --labels names.txt --engine none",
        "repvgg-deploy export --module nets:PyramidNet --checkpoint net.pth --example 1x3x512x512",
    ),
)
@path_argument("ckpt", required=False)
@checkpoint_options
@pretrained_option
@offline_option
@config_options
@records_input
@module_options
@preprocessing_options
@int8_options
@graph_options
@engine_options
@option_group(
    "Verification",
    click.option("--verify-data", type=PATH, metavar="DIR",
                 help="Images that the stages are compared on.  [default: a few synthetic images]"),
    click.option("--verify-full", is_flag=True, help="Compare every stage at full size, on 16 images."),
)  # fmt: skip
@option_group(
    "Output",
    click.option("-o", "--output", type=PATH, default=Path(), metavar="DIR", callback=_check_folder,
                 help="Folder for NAME.PRECISION.onnx, .plan and .plan.json, NAME being the checkpoint's."),
    click.option("--fp16", is_flag=True, help="Write a float16 graph."),
    click.option("--int8", is_flag=True, help="Write an INT8 graph; needs --calib."),
    click.option("--all", is_flag=True,
                 help="Write fp32, fp16 and INT8 graphs, a table of them, and MODEL_CARD.md; needs --calib."),
)  # fmt: skip
@records_output
@junit_option
@output_options
def export(
    ckpt: Path | None, output: Path, fp16: bool, int8: bool, layers: bool, labels: Path | None, **options: Any
) -> Any:
    """Write the verified, simplified ONNX graph of a checkpoint, and an engine if one can be built.

    The files are DIR/NAME.PRECISION.onnx, .plan and .plan.json: net.fp16.onnx of net.pth with --fp16. Every stage is
    compared with the one before, on a few synthetic images or on those of --verify-data. If they differ, nothing is
    written, and files of an earlier export stay as they are.
    """
    if fp16 + int8 + options["all"] > 1:
        raise click.UsageError("--fp16, --int8 and --all exclude each other; --rest fp16 is for what is not INT8.")
    if options["module"] is not None:
        given = {"ckpt": ckpt, "output": output, "fp16": fp16, "int8": int8, "layers": layers, "labels": labels}
        return export_whole({**given, **options})
    leave_out_module_options(options)
    ckpt = _choose_checkpoint(ckpt, options)
    every, validation = options.pop("all"), options["val"]
    class_names = read_labels(labels)
    prepare_process()
    # It loads on another core while torch is imported on this one.
    with SimplificationCheck() as simplification:
        with quick_imports():
            # Torch with it, and all else that every export needs.
            import repvgg_deploy.workflows.export  # noqa: F401
            from repvgg_deploy.artifacts import Precision
            from repvgg_deploy.workflows.export_request import ExportRequest

        records = take_records(options, ckpt, labels)
        request = ExportRequest(
            checkpoint=ckpt,
            output=output,
            source=take_checkpoint(options),
            precision=Precision.INT8 if int8 else Precision.FP16 if fp16 else Precision.FP32,
            int8=take_int8(options, int8 or every, val_alone=every),
            build=take_build(options),
            graph=take_graph(options, class_names),
            preprocessing=take_preprocessing(options),
            **options,
        )
        if every:
            from repvgg_deploy.workflows.export_all import ExportAllRequest

            return _export_all(ExportAllRequest(request, validation), layers, records, simplification)
        return _export_one(request, layers, records, simplification)


def _choose_checkpoint(ckpt: Path | None, options: dict[str, Any]) -> Path:
    """The file to export: CKPT, or a published one, whose options are removed from `options`.

    Raises:
        click.UsageError: neither is given, or both are.
    """
    if ckpt is not None and options["pretrained"] is not None:
        raise click.UsageError("--pretrained stands in place of CKPT.")
    path = take_pretrained(options) or ckpt
    if path is None:
        raise click.UsageError("Missing argument 'CKPT', or --arch NAME --pretrained SOURCE.")
    return path


def _export_one(
    request: ExportRequest, layers: bool, records: RecordsRequest, simplification: SimplificationCheck
) -> Outcome:
    from repvgg_deploy.cli.tables import print_export
    from repvgg_deploy.workflows.export import export as run_export
    from repvgg_deploy.workflows.records import keep_records

    precisions = (request.precision,)
    with show_progress() as progress, keep_records(records, request, precisions, progress) as finish:
        result = run_export(request, progress, simplification, finish)
    images = "synthetic images" if request.verify_data is None else f"images of {request.verify_data}"
    written = describe_records(records, records.statement_path(request, precisions))

    def show() -> None:
        print_export(result, layers, images)
        _print_records(written)

    return Outcome({**result.to_dict(), **written}, show, checks=_list_stages(result))


def _export_all(
    request: ExportAllRequest, layers: bool, records: RecordsRequest, simplification: SimplificationCheck
) -> Outcome:
    from repvgg_deploy.artifacts import Precision
    from repvgg_deploy.cli.tables import print_export_all
    from repvgg_deploy.workflows.export_all import export_all
    from repvgg_deploy.workflows.records import keep_records

    precisions = tuple(Precision)
    with show_progress() as progress, keep_records(records, request.base, precisions, progress) as finish:
        result = export_all(request, progress, simplification, finish)
    written = describe_records(records, records.statement_path(request.base, precisions))
    checks = tuple(check for one in result.results for check in _list_stages(one))

    def show() -> None:
        print_export_all(result, layers)
        _print_records(written)

    return Outcome({**result.to_dict(), **written}, show, schema="export-all", checks=checks)


def _print_records(written: Mapping[str, str]) -> None:
    for path in written.values():
        click.echo(path)


def _list_stages(result: CheckpointExportResult) -> tuple[LimitCheck, ...]:
    """Every comparison of an export, each of which has passed, or there would be no result."""
    return tuple(
        LimitCheck(f"{result.onnx.name}: {stage}, relative difference from the stage before", parity.relative, None)
        for stage, parity in result.parity.items()
    )


@click.command(
    cls=Command,
    examples=(
        "repvgg-deploy fuse net.pth -o net-deploy.pth",
        "repvgg-deploy fuse net.pth -o net-deploy.safetensors --layout timm",
    ),
)
@path_argument("ckpt")
@checkpoint_options
@option_group(
    "Output",
    click.option("-o", "--output", type=PATH, required=True, metavar="FILE", help="File to write, by its ending."),
    click.option("--layout", type=click.Choice(["official", "timm"]),
                 help="Whose parameter names.  [default: timm for a checkpoint of timm, else official]"),
)  # fmt: skip
@output_options
def fuse(ckpt: Path, output: Path, **options: Any) -> Any:
    """Write the deploy form of a checkpoint, for the official code or timm to load."""
    from repvgg_deploy.cli.tables import print_fields
    from repvgg_deploy.workflows.fuse_checkpoint import write_fused

    written = write_fused(ckpt, output, options.pop("layout"), take_checkpoint(options))
    values = {
        "file": str(written.path),
        "arch": written.arch,
        "layout": written.layout,
        "parameters": written.parameters,
        "parity": written.parity.to_dict(),
    }
    return Outcome(values, lambda: print_fields(values))


@click.command(
    cls=Command,
    examples=(
        "repvgg-deploy export net.pth --fp16 --refittable",
        "repvgg-deploy refit net.fp16.plan newer.pth",
    ),
)
@path_argument("engine")
@path_argument("weights")
@output_options
def refit(engine: Path, weights: Path) -> Any:
    """Put new weights into a refittable engine, without a rebuild.

    WEIGHTS is a checkpoint of the engine's architecture, or an ONNX graph that was exported from one. The plan and its
    sidecar are replaced only once everything has worked.
    """
    from repvgg_deploy.cli.tables import print_fields
    from repvgg_deploy.workflows.refit import refit_in_place

    with show_progress() as progress:
        written = refit_in_place(engine, weights, progress)
    values = {"engine": str(engine), "weights": str(weights), "sha256": written.side.sha256}
    return Outcome(values, lambda: print_fields(values))
