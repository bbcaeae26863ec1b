"""`export --module`: a net that the user's own code makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from repvgg_deploy.cli.command import Outcome, option_group, show_progress
from repvgg_deploy.cli.options import PATH, flag, is_given, take_preprocessing
from repvgg_deploy.cli.startup import prepare_process
from repvgg_deploy.files.printable import printable

if TYPE_CHECKING:
    from repvgg_deploy.workflows.export_result import ModuleExportResult

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    ShapeType = click.ParamType[tuple[int, ...]]
else:
    ShapeType = click.ParamType

_OPTIONS = ("module", "kwargs", "checkpoint", "example")
_SHARED = {
    *_OPTIONS,
    "output",
    "fp16",
    "int8",
    "calib",
    "calib_count",
    "recipe",
    "engine",
    "opset",
    "mean",
    "std",
    "resize",
}


class Shape(ShapeType):
    """`1x3x512x512`, as (batch, channels, height, width)."""

    name = "NxCxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse `value`, or fail as wrong usage."""
        if isinstance(value, tuple):
            return value
        if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", str(value)) is None:
            self.fail(f"{value!r} is not a shape, such as 1x3x512x512", param, ctx)
        return tuple(int(size) for size in str(value).split("x"))


module_options: Callable[[F], F] = option_group(
    "Input",
    click.option("--module", metavar="MODULE:FACTORY",
                 help="Function or class that makes a net with RepVGG blocks; this runs that code."),
    click.option("--kwargs", metavar="JSON", help="Keywords of the factory, a JSON object."),
    click.option("--checkpoint", type=PATH, metavar="FILE", help="Weights of that net, in place of CKPT."),
    click.option("--example", type=Shape(), metavar="NxCxHxW", help="Shape of its input; the batch is dynamic."),
)  # fmt: skip


def leave_out_module_options(values: dict[str, Any]) -> None:
    """Remove the options of whole networks from `values`, where there is no `--module`.

    Raises:
        click.UsageError: one of them is given.
    """
    for option in _OPTIONS:
        if values.pop(option) is not None:
            raise click.UsageError(f"{flag(option)} is for --module.")


def export_whole(options: dict[str, Any]) -> Outcome:
    """What `export` does where `--module` is given.

    Raises:
        click.UsageError: an option that a checkpoint's export has is given, or one is missing.
    """
    for option in options:
        if option not in _SHARED and is_given(option):
            raise click.UsageError(f"{flag(option)} is not for --module.")
    if options["checkpoint"] is None or options["example"] is None:
        raise click.UsageError("--module needs --checkpoint FILE and --example NxCxHxW.")
    if options["int8"] and options["calib"] is None:
        raise click.UsageError("--int8 needs --calib DIR, a few hundred typical images.")
    prepare_process()
    import torch

    from repvgg_deploy.artifacts import Precision
    from repvgg_deploy.quantization.calibration_images import choose_images
    from repvgg_deploy.quantization.recipe import load_recipe
    from repvgg_deploy.workflows.export_module import export_module
    from repvgg_deploy.workflows.module_factory import make_module

    precision = Precision.INT8 if options["int8"] else Precision.FP16 if options["fp16"] else Precision.FP32
    shape, calibration = options["example"], None
    with show_progress() as progress:
        progress.note(f"note: running the code of {options['module']}")
        module = make_module(options["module"], options["kwargs"], options["checkpoint"])
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if precision is Precision.INT8:
            recipe = load_recipe(options["recipe"])
            preprocessing = _preprocessing(options, shape)
            count = options["calib_count"] or recipe.count
            images = choose_images(options["calib"], count, recipe.seed, preprocessing, progress)
            calibration = [torch.from_numpy(batch) for batch in images]
            example = calibration[0][:1]
        path = options["output"] / f"{options['module'].partition(':')[2]}.{precision}.onnx"
        result = export_module(
            module, example, path, precision=precision, calibration=calibration, engine=options["engine"],
            recipe=options["recipe"], opset=options["opset"], progress=progress,
        )  # fmt: skip
    return Outcome(result.to_dict(), lambda: print_module_export(result), schema="export-module")


def _preprocessing(options: dict[str, Any], shape: tuple[int, ...]) -> Any:
    from repvgg_deploy.artifacts import Preprocessing

    if len(shape) != 4 or shape[1] != 3:
        raise click.UsageError("--calib takes images, and --example is not a batch of images: NxCxHxW with 3 channels.")
    given = take_preprocessing({**options, "size": (shape[2], shape[3])})
    return given.apply(replace(Preprocessing(), height=shape[2], width=shape[3], resize=max(shape[2:])))


def print_module_export(result: ModuleExportResult) -> None:
    """What was written, and how every output compares with that of the stage before."""
    from repvgg_deploy.cli.output import print_table

    rows = [
        [stage, name, p.max_abs, p.relative, f"{p.cosine:.8f}", f"{p.top1_agreement:.1f} %"]
        for stage, outputs in result.parity.items()
        for name, p in outputs.items()
    ]
    print_table(["stage", "output", "max abs", "relative", "cosine", "agreement"], rows)
    print(f"{len(result.blocks)} blocks fused; {sum(len(c.layers) for c in result.chains)} convolutions in INT8")
    megabytes = Path(result.onnx).stat().st_size / 1e6
    print(f"{printable(str(result.onnx), 5000)}  {megabytes:.1f} MB, {result.module}, {result.seconds:.1f} s")
    if result.engine is not None and result.plan is not None:
        plan = result.plan
        print(f"{printable(str(plan), 5000)}  {plan.stat().st_size / 1e6:.1f} MB, {result.engine.side.label}")
