"""Options that several commands share, one group a concern, and the types that they parse to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from repvgg_deploy.errors import DeployError

if TYPE_CHECKING:
    from repvgg_deploy.artifacts import PreprocessingOptions
    from repvgg_deploy.engine.options import BuildOptions
    from repvgg_deploy.images.decoding import DecodingOptions
    from repvgg_deploy.workflows.export_request import Int8Request

    SizeType = click.ParamType[tuple[int, int]]
    ChannelsType = click.ParamType[tuple[float, ...]]
else:
    # Older releases of click have no generic ParamType.
    SizeType = ChannelsType = click.ParamType

F = TypeVar("F", bound=Callable[..., Any])


_LARGEST = 8192


class FiniteRange(click.FloatRange):
    """A number within limits, which `nan` and `inf` are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse `value`, or fail as wrong usage."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


class Size(SizeType):
    """`224`, or `HxW` as in `192x256`, as (height, width)."""

    name = "PX|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse `value`, or fail as wrong usage."""
        match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", str(value))
        if match is None or not all(0 < int(size) <= _LARGEST for size in match.groups() if size is not None):
            self.fail(f"{value!r} is no size; give pixels, as 224 or 192x256, up to {_LARGEST}", param, ctx)
        return int(match[1]), int(match[2] or match[1])


class Channels(ChannelsType):
    """One number a channel, separated by commas or spaces, as `0.485,0.456,0.406`."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse `value`, or fail as wrong usage."""
        try:
            numbers = tuple(float(part) for part in re.split(r"[,\s]+", str(value).strip()))
        except ValueError:
            numbers = (math.nan,)
        if not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is not one number a channel, as 0.485,0.456,0.406", param, ctx)
        return numbers


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def checkpoint_options(command: F) -> F:
    """How a checkpoint is read."""
    return _stack(
        click.option("--arch", metavar="NAME", help="The architecture that the checkpoint must hold: A0, B1g4, …"),
        click.option("--ema/--no-ema", default=None, help="Take the EMA copy of the weights, or the plain ones."),
    )(command)


def preprocessing_options(command: F) -> F:
    """How an image becomes the input; the model's metadata or card by default."""
    return _stack(
        click.option("--size", type=Size(), help="Input size in pixels."),
        click.option("--resize", type=click.IntRange(min=1), metavar="PX", help="Short side before the crop."),
        click.option("--mean", type=Channels(), help="Mean a channel, of values from 0 to 1."),
        click.option("--std", type=Channels(), help="Standard deviation a channel."),
    )(command)


def decoding_options(command: F) -> F:
    """How image files are decoded."""
    return _stack(
        click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Threads that decode; one per core."),
        click.option(
            "--decoder",
            type=click.Choice(["auto", "pillow"]),
            default="auto",
            show_default=True,
            help="What decodes JPEG files: simplejpeg where it is installed, or always Pillow.",
        ),
        click.option(
            "--max-image-mib",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            metavar="MIB",
            help="Memory that one decoded image may take; a larger one counts as broken.",
        ),
    )(command)


def take_decoding(values: dict[str, Any]) -> DecodingOptions:
    """Remove the decoding options from `values` and return them as one object."""
    from repvgg_deploy.images.decoding import DecodingOptions

    return DecodingOptions(values.pop("workers"), values.pop("max_image_mib") << 20, values.pop("decoder"))


def graph_options(command: F) -> F:
    """What an exported graph takes and gives."""
    return _stack(
        click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Fix the batch; dynamic by default."),
        click.option("--opset", type=int, default=19, show_default=True, help="ONNX opset, from 13."),
        click.option(
            "--io", type=click.Choice(["fp32", "fp16"]), default="fp32", help="Type of input and output [fp32]."
        ),
        click.option("--uint8-input", is_flag=True, help="Take uint8 NHWC pixels; normalize inside the graph."),
        click.option("--softmax", is_flag=True, help="Give probabilities in place of logits."),
        click.option("--topk", type=click.IntRange(min=1), metavar="K", help="Give the K best scores and classes."),
        click.option("--labels", type=click.Path(path_type=Path), metavar="FILE", help="Class names, one a line."),
    )(command)


def int8_options(command: F) -> F:
    """How INT8 is calibrated."""
    path = click.Path(path_type=Path)
    return _stack(
        click.option(
            "--calib",
            type=path,
            metavar="DIR|none",
            help="Calibration images: a folder, or a list of files; none makes pictures from the BN statistics.",
        ),
        click.option(
            "--calib-count", type=click.IntRange(min=1), metavar="N", help="How many; by default the recipe's."
        ),
        click.option(
            "--calib-seconds",
            type=FiniteRange(min=0, min_open=True),
            metavar="S",
            help="The time that making pictures may take (--calib none).",
        ),
        click.option("--calib-cache", type=path, metavar="FILE", help="Keep the calibration's statistics there."),
        click.option(
            "--calib-device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to quantize [cpu]."
        ),
        click.option("--recipe", default="accurate", metavar="NAME|FILE", help="fast, accurate, thorough, or a file."),
        click.option(
            "--rest", type=click.Choice(["fp32", "fp16"]), default="fp32", help="What stays float in INT8 [fp32]."
        ),
        click.option(
            "--activation-type",
            type=click.Choice(["uint8", "int8"]),
            default="uint8",
            help="Type of the activations' zero-points; int8 for TensorRT before 10.10, which refuses uint8 [uint8].",
        ),
        click.option("--keep-float", multiple=True, metavar="LAYER", help="Do not quantize this layer; repeatable."),
        click.option("--max-drop", type=FiniteRange(min=0), metavar="POINTS", help="The most top-1 to lose."),
        click.option("--val", type=path, metavar="DIR", help="Labelled images for --max-drop: DIR/<class>/*.jpg."),
        click.option("--layers", is_flag=True, help="Print a table of the quantized layers."),
    )(command)


def engine_options(command: F) -> F:
    """Whether and how an engine is built."""
    backends = click.Choice(["auto", "tensorrt", "tensorrt-rtx", "none"])
    return _stack(
        click.option("--engine", type=backends, default="auto", show_default=True, help="The engine's backend."),
        click.option(
            "--batch-range", type=int, nargs=3, metavar="MIN OPT MAX", help="The engine's profile [1 32 256]."
        ),
        click.option("--workspace", type=click.IntRange(min=0), metavar="MIB", help="Most GPU memory of a layer."),
        click.option("--optimization-level", type=click.IntRange(0, 5), help="Of the builder, 0 to 5."),
        click.option("--refittable", is_flag=True, help="The engine can take new weights."),
        click.option("--strip-weights", is_flag=True, help="The plan holds no weights before `refit`."),
        click.option(
            "--hardware-compatibility",
            type=click.Choice(["none", "ampere+", "same-compute-capability"]),
            default="none",
            help="GPUs besides the builder's own.",
        ),
        click.option(
            "--compute-capability",
            multiple=True,
            metavar="X.Y",
            help="GPUs to build for, where none is here (TensorRT-RTX); repeatable.",
        ),
        click.option("--version-compatible", is_flag=True, help="Also for later releases of the major version."),
        click.option("--timing-cache/--no-timing-cache", default=True, help="Keep kernel times between builds."),
        click.option("--tf32/--no-tf32", default=True, help="Let FP32 convolutions use TF32."),
    )(command)


def take_int8(values: dict[str, Any], wanted: bool) -> Int8Request | None:
    """Remove the INT8 options from `values` and return them as one object; None where INT8 is not wanted.

    Raises:
        click.UsageError: an option that only INT8 has is given without it, or one is missing beside another.
    """
    from repvgg_deploy.artifacts import Precision
    from repvgg_deploy.workflows.export_request import Int8Request

    names = {
        "calib": "images", "calib_count": "count", "calib_seconds": "seconds",
        "calib_cache": "cache", "calib_device": "device", "recipe": "recipe",
        "rest": "rest", "keep_float": "keep_float", "activation_type": "activation_type", "val": "validation",
        "max_drop": "max_drop",
    }  # fmt: skip
    request = {field: values.pop(option) for option, field in names.items()}
    if not wanted:
        context = click.get_current_context()
        for option in (*names, "layers"):
            if context.get_parameter_source(option) is not ParameterSource.DEFAULT:
                raise click.UsageError(f"--{option.replace('_', '-')} is for --int8.")
        return None
    if request["images"] is None:
        raise click.UsageError(
            "--int8 needs --calib DIR, a few hundred typical images; --calib none makes pictures where there are none."
        )
    if request["images"] == Path("none"):
        request["images"] = None
    elif request["seconds"] is not None:
        raise click.UsageError("--calib-seconds is for --calib none.")
    if (request["max_drop"] is None) != (request["validation"] is None):
        raise click.UsageError("--max-drop and --val DIR belong together.")
    return Int8Request(**{**request, "rest": Precision(request["rest"])})


_BUILD = (
    "batch_range", "workspace", "optimization_level", "refittable", "strip_weights", "hardware_compatibility",
    "compute_capability", "version_compatible", "timing_cache", "tf32",
)  # fmt: skip


def take_build(values: dict[str, Any]) -> BuildOptions:
    """Remove the options of an engine build from `values` and return them as one object."""
    from repvgg_deploy.engine.options import BuildOptions

    context = click.get_current_context()
    if values["engine"] == "none":
        for option in _BUILD:
            if context.get_parameter_source(option) is not ParameterSource.DEFAULT:
                raise click.UsageError(f"--{option.replace('_', '-')} is for an engine, and --engine none builds none.")
    if values["batch"] is not None and values["batch_range"] is not None:
        raise click.UsageError("--batch fixes the batch, so there is no --batch-range.")
    workspace = values.pop("workspace")
    smallest, best, largest = values["batch_range"] or BuildOptions.batch_range
    if not 1 <= smallest <= best <= largest:
        raise click.UsageError(f"--batch-range {smallest} {best} {largest} is not in order: MIN OPT MAX, from 1.")
    return BuildOptions(
        batch_range=values.pop("batch_range") or BuildOptions.batch_range,
        compute_capabilities=tuple(values.pop("compute_capability")),
        workspace_bytes=None if workspace is None else workspace << 20,
        **{name: values.pop(name) for name in _BUILD if name in values},
    )


def json_option(command: F) -> F:
    """JSON on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def integers_option(command: F) -> F:
    """How an INT8 graph is run on a CPU whose integer kernels saturate on it."""
    return click.option(
        "--integers",
        type=click.Choice(["exact", "native"]),
        default="exact",
        show_default=True,
        help="Sums of an INT8 graph that may saturate on this CPU: exact, or as its kernels compute them.",
    )(command)


def take_exact_integers(values: dict[str, Any]) -> bool:
    """Remove `--integers` from `values` and return whether it asks for exact sums."""
    return bool(values.pop("integers") == "exact")


def trust_option(command: F) -> F:
    """Whether an engine without a matching side file is run."""
    return click.option("--trust", is_flag=True, help="Run an engine whose side file is missing or does not match.")(
        command
    )


def path_argument(name: str, **options: Any) -> Callable[[F], F]:
    """A path; whether it exists is told by the code that opens it, as an error with a hint."""
    return click.argument(name, type=click.Path(path_type=Path), **options)


def take_preprocessing(values: dict[str, Any]) -> PreprocessingOptions:
    """Remove the preprocessing options from `values` and return them as one object."""
    from repvgg_deploy.artifacts import PreprocessingOptions

    return PreprocessingOptions(*(values.pop(name) for name in ("size", "resize", "mean", "std")))


def read_labels(path: Path | None) -> tuple[str, ...] | None:
    """The class names in the file of `--labels`, one a line."""
    if path is None:
        return None
    try:
        # A byte order mark, as some editors write it, is no part of the first name.
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except OSError as error:
        raise DeployError(
            f"cannot read the labels {path}: {error.strerror}", "a text file, one class a line"
        ) from error
    except UnicodeDecodeError as error:
        raise DeployError(f"the labels {path} are no UTF-8 text", "save the file as UTF-8, one class a line") from error
    if not all(names):
        number = names.index("") + 1
        raise DeployError(
            f"line {number} of the labels {path} is empty", "one class a line, in the order of the outputs"
        )
    return tuple(names)
