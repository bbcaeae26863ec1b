"""Options that several commands share: one decorator per concern, and a function that makes one object of its values.

To add an option to a concern, add a `click.option` to its decorator below and, where there is one, take it in the
function beside it. What a decorator adds reaches the command in `**options`, by the name that click gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from repvgg_deploy.cli.command import option_group
from repvgg_deploy.cli.types import ACTIVATION, ARCH, RECIPE, Channels, FilePath, FiniteRange, Size, Stages, Strides
from repvgg_deploy.errors import DeployError

if TYPE_CHECKING:
    from repvgg_deploy.artifacts import PreprocessingOptions
    from repvgg_deploy.checkpoints import CheckpointOptions
    from repvgg_deploy.engine.options import BuildOptions
    from repvgg_deploy.images.decoding import DecodingOptions
    from repvgg_deploy.serving.ray_cluster import RayOptions
    from repvgg_deploy.workflows.export_request import GraphRequest, Int8Request

F = TypeVar("F", bound=Callable[..., Any])

PATH: Any = FilePath()
"""A path; whether it exists is reported by the code that opens it, as an error with a hint."""


def path_argument(name: str, **options: Any) -> Callable[[F], F]:
    """A positional path."""
    return click.argument(name, type=PATH, **options)


checkpoint_options = option_group(
    "Input",
    click.option("--arch", type=ARCH, metavar="NAME", help="Required architecture: A0, B1g4, …; another is an error."),
    click.option("--ema/--no-ema", default=None, help="Copy of the weights to use, if the file also has an EMA copy."),
    click.option("--net", metavar="PREFIX", help="Net to use if the file has several, by the prefix of its names."),
    click.option("--strides", type=Strides(), metavar="S,S,…",
                 help="Stride of the stem and of each stage.  [default: as the configuration says, or 2,2,2,2,2]"),
    click.option("--act", type=ACTIVATION, metavar="NAME",
                 help="Activation of the blocks: relu, silu, …  [default: as the configuration says, or relu]"),
    click.option("--bn-eps", type=FiniteRange(min=0, min_open=True), metavar="X",
                 help="Epsilon of the batch norms.  [default: as the configuration says, or 1e-05]"),
    click.option("--head-act", type=click.Choice(["relu", "none"]),
                 help="What stands between the linear layers of a head that has several."),
)  # fmt: skip
"""How a checkpoint is read, and what its tensors do not tell."""

preprocessing_options = option_group(
    "Preprocessing",
    click.option("--size", type=Size(), help="Input size in pixels.  [default: the model's own, or its card's]"),
    click.option("--resize", type=click.IntRange(min=1), metavar="PX", help="Shorter side before the center crop."),
    click.option("--mean", type=Channels(), help="Mean per channel, of values from 0 to 1."),
    click.option("--std", type=Channels(), help="Standard deviation per channel."),
    click.option("--interpolation", type=click.Choice(["bilinear", "bicubic", "lanczos", "nearest"]),
                 help="Filter that images are resized with."),
    click.option("--crop-ratio", type=FiniteRange(min=0, max=1, min_open=True), metavar="R",
                 help="Input size over the shorter side before the crop, in place of --resize."),
    click.option("--color-order", type=click.Choice(["rgb", "bgr"]), help="Order of the input's channels."),
)  # fmt: skip
"""How an image becomes the input; the model's metadata or card by default."""

decoding_options = option_group(
    "Decoding",
    click.option("--workers", type=click.IntRange(min=1), metavar="N",
                 help="Threads that decode images.  [default: one per core]"),
    click.option("--decoder", type=click.Choice(["auto", "pillow"]), default="auto",
                 help="Decoder of JPEG files: simplejpeg if it is installed, or always Pillow."),
    click.option("--max-image-mib", type=click.IntRange(min=1), default=512, metavar="MIB",
                 help="Limit on the memory of one decoded image; a larger one counts as broken."),
)  # fmt: skip
"""How image files are decoded."""

graph_options = option_group(
    "Graph",
    click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Fixed batch size.  [default: dynamic]"),
    click.option("--opset", type=click.IntRange(min=1), default=19, metavar="N", help="ONNX opset, 13 or newer."),
    click.option("--io", type=click.Choice(["fp32", "fp16"]), default="fp32", help="Type of the input and the output."),
    click.option("--uint8-input", is_flag=True, help="Input of uint8 NHWC pixels, normalized inside the graph."),
    click.option("--softmax", is_flag=True, help="Probabilities in place of logits."),
    click.option("--topk", type=click.IntRange(min=1), metavar="K", help="Only the K best scores and their classes."),
    click.option(
        "--features",
        type=Stages(),
        metavar="[STAGES]",
        help="Pooled features in place of classes, or the maps of stages, as 2,3,4.",
    ),
    click.option("--labels", type=PATH, metavar="FILE", help="Names of the classes, one per line."),
)
"""What an exported graph takes and gives; for commands of the class `FeaturesCommand`."""

int8_options = option_group(
    "INT8",
    click.option("--calib", type=PATH, metavar="DIR|none",
                 help="Calibration images: a folder, or a file that lists them; none: synthesized from BN statistics."),
    click.option("--calib-count", type=click.IntRange(min=1), metavar="N",
                 help="Number of calibration images.  [default: the recipe's]"),
    click.option("--calib-seconds", type=FiniteRange(min=0, min_open=True), metavar="S",
                 help="Limit on the time to synthesize images, with --calib none."),
    click.option("--calib-cache", type=PATH, metavar="FILE",
                 help="Where to keep the statistics for the next run; or the scales that `qat` wrote."),
    click.option("--calib-device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to quantize."),
    click.option("--recipe", type=RECIPE, default="accurate", metavar="NAME|FILE",
                 help="Method of quantization: fast, accurate, thorough, or a TOML file."),
    click.option("--rest", type=click.Choice(["fp32", "fp16"]), default="fp32",
                 help="Precision of the layers that are not INT8."),
    click.option("--activation-type", type=click.Choice(["uint8", "int8"]), default="uint8",
                 help="Type of the activations; int8 for TensorRT before 10.10, which refuses uint8."),
    click.option("--full-range", is_flag=True,
                 help="Activations after a ReLU up to 255 instead of 127: finer, for ONNX Runtime and OpenVINO only."),
    click.option("--keep-float", multiple=True, metavar="LAYER", help="Layer that is not quantized; repeatable."),
    click.option("--max-drop", type=FiniteRange(min=0), metavar="POINTS",
                 help="Limit on the top-1 loss on the images of --val; layers are kept in float to meet it."),
    click.option("--val", type=PATH, metavar="DIR",
                 help="Labeled images for --max-drop, and for the table of --all: DIR/<class>/*.jpg."),
    click.option("--layers", is_flag=True, help="Also print a table of the quantized layers."),
)  # fmt: skip
"""How INT8 is calibrated."""

engine_options = option_group(
    "Engine",
    click.option("--engine", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx", "none"]), default="auto",
                 help="Backend that builds the engine; auto builds one if it can."),
    click.option("--batch-range", type=int, nargs=3, metavar="MIN OPT MAX",
                 help="Batch sizes of a dynamic engine.  [default: 1 32 256]"),
    click.option("--workspace", type=click.IntRange(min=0), metavar="MIB", help="Limit on the GPU memory of a layer."),
    click.option("--optimization-level", type=click.IntRange(0, 5), metavar="0-5",
                 help="Effort of the build, 5 the most.  [default: the backend's]"),
    click.option("--refittable", is_flag=True, help="Allow `refit` to replace the weights later."),
    click.option("--strip-weights", is_flag=True, help="Leave the weights out; the engine needs `refit` to run."),
    click.option("--hardware-compatibility", type=click.Choice(["none", "ampere+", "same-compute-capability"]),
                 default="none", help="GPUs that the engine runs on besides the one that builds it."),
    click.option("--compute-capability", multiple=True, metavar="X.Y",
                 help="GPU to build for when there is none here (TensorRT-RTX); repeatable."),
    click.option("--version-compatible", is_flag=True, help="Run on later releases of the same major version too."),
    click.option("--timing-cache/--no-timing-cache", default=True, help="Keep kernel times between builds."),
    click.option("--tf32/--no-tf32", default=True, help="Allow TF32 in FP32 convolutions."),
)  # fmt: skip
"""Whether and how an engine is built."""

ray_options = option_group(
    "Cluster",
    click.option("--ray", is_flag=False, flag_value="auto", metavar="[ADDRESS]",
                 help="Ray cluster to run on: this machine's, or that at ADDRESS; `local` starts one."),
    click.option("--ray-actors", type=click.IntRange(min=1), default=1, metavar="N", help="Processes with a model."),
    click.option("--ray-cpus", type=FiniteRange(min=0), default=1.0, metavar="N",
                 help="Cores per process, and its threads."),
    click.option("--ray-gpus", type=FiniteRange(min=0), default=0.0, metavar="N", help="GPUs per process, or a share."),
)  # fmt: skip
"""Where a command runs, if not here."""

junit_option = option_group(
    "Output",
    click.option("--junit", type=PATH, metavar="FILE",
                 help="JUnit XML file to write: a test case for the command, and one per limit; on failure too."),
)  # fmt: skip
"""A report for a CI server; `Command` takes this value, the function does not get it."""

output_options = option_group(
    "Output",
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout, and nothing else."),
    click.option("-q", "--quiet", is_flag=True, help="No progress on stderr, only warnings and errors."),
    click.option("-v", "--verbose", is_flag=True, help="Times of each step on stderr."),
)
"""What every command prints, and how; `Command` takes these values, the function does not get them."""


def is_given(option: str) -> bool:
    """Whether the running command's option was typed, rather than set by default or in the environment."""
    return click.get_current_context().get_parameter_source(option) is ParameterSource.COMMANDLINE


def flag(option: str) -> str:
    """An option as it is typed: `--calib-count` of `calib_count`."""
    return f"--{option.replace('_', '-')}"


def take_checkpoint(values: dict[str, Any]) -> CheckpointOptions:
    """Remove the options of a checkpoint from `values` and return them as one object."""
    from repvgg_deploy.checkpoints import CheckpointOptions
    from repvgg_deploy.nets.settings import StructureOptions

    names = ("strides", "act", "bn_eps", "head_act")
    structure = StructureOptions(*(values.pop(name) for name in names))
    return CheckpointOptions(values.pop("arch"), values.pop("ema"), structure, values.pop("net"))


def take_int8(values: dict[str, Any], wanted: bool, val_alone: bool = False) -> Int8Request | None:
    """Remove the INT8 options from `values` and return them as one object; None if INT8 is not wanted.

    With `val_alone`, labeled images without a limit are not part of the request.

    Raises:
        click.UsageError: an option that only INT8 has is given without it, or one is missing beside another.
    """
    from repvgg_deploy.artifacts import Precision
    from repvgg_deploy.workflows.export_request import Int8Request

    names = {
        "calib": "images", "calib_count": "count", "calib_seconds": "seconds",
        "calib_cache": "cache", "calib_device": "device", "recipe": "recipe",
        "rest": "rest", "keep_float": "keep_float", "activation_type": "activation_type",
        "full_range": "full_range", "val": "validation", "max_drop": "max_drop",
    }  # fmt: skip
    request = {field: values.pop(option) for option, field in names.items()}
    if not wanted:
        for option in (*names, "layers"):
            if is_given(option):
                raise click.UsageError(f"{flag(option)} is for --int8.")
        return None
    if request["images"] is None and request["cache"] is not None and request["cache"].exists():
        # Without images to calibrate on, the file is of use only if it has the scales that `qat` wrote.
        request["scales"], request["cache"] = request["cache"], None
    elif request["images"] is None:
        raise click.UsageError(
            f"--{'all' if val_alone else 'int8'} needs --calib DIR, a few hundred typical images;"
            " --calib none synthesizes images if there are none."
        )
    if request["images"] == Path("none"):
        request["images"] = None
    elif request["seconds"] is not None:
        raise click.UsageError("--calib-seconds is for --calib none.")
    if val_alone and request["max_drop"] is None:
        request["validation"] = None
    if (request["max_drop"] is None) != (request["validation"] is None):
        raise click.UsageError("--max-drop and --val DIR belong together.")
    return Int8Request(**{**request, "rest": Precision(request["rest"])})


_BUILD = (
    "batch_range", "workspace", "optimization_level", "refittable", "strip_weights", "hardware_compatibility",
    "compute_capability", "version_compatible", "timing_cache", "tf32",
)  # fmt: skip


def take_graph(values: dict[str, Any], class_names: tuple[str, ...] | None) -> GraphRequest:
    """Remove what is asked of the graph from `values` and return it as one object."""
    from repvgg_deploy.artifacts import Precision
    from repvgg_deploy.workflows.export_request import GraphRequest

    names = ("opset", "uint8_input", "softmax", "topk", "features")
    given = {name: values.pop(name) for name in names}
    return GraphRequest(batch=values.pop("batch"), io=Precision(values.pop("io")), class_names=class_names, **given)


def take_build(values: dict[str, Any]) -> BuildOptions:
    """Remove the options of an engine build from `values` and return them as one object.

    Raises:
        click.UsageError: they contradict each other.
    """
    from repvgg_deploy.engine.options import BuildOptions

    if values["engine"] == "none":
        for option in _BUILD:
            if is_given(option):
                raise click.UsageError(f"{flag(option)} is for an engine, and --engine none builds none.")
    if values["batch"] is not None and values["batch_range"] is not None:
        raise click.UsageError("--batch fixes the batch size, which --batch-range MIN OPT MAX leaves open.")
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


def take_ray(values: dict[str, Any]) -> RayOptions | None:
    """Remove the cluster's options from `values` and return them as one object; None without `--ray`.

    Raises:
        click.UsageError: an option that only a cluster has is given without it.
    """
    address = values.pop("ray")
    numbers = {name: values.pop(f"ray_{name}") for name in ("actors", "cpus", "gpus")}
    if address is None:
        for name in numbers:
            if is_given(f"ray_{name}"):
                raise click.UsageError(f"--ray-{name} is for --ray.")
        return None
    from repvgg_deploy.serving.ray_cluster import RayOptions

    return RayOptions(address, **numbers)


def take_preprocessing(values: dict[str, Any]) -> PreprocessingOptions:
    """Remove the preprocessing options from `values` and return them as one object.

    Raises:
        click.UsageError: two of them say the same.
    """
    from repvgg_deploy.artifacts import PreprocessingOptions

    if values["resize"] is not None and values["crop_ratio"] is not None:
        raise click.UsageError("--crop-ratio and --resize set the same value; give one of them.")
    names = ("size", "resize", "mean", "std", "interpolation", "color_order", "crop_ratio")
    return PreprocessingOptions(**{name: values.pop(name) for name in names})


def take_decoding(values: dict[str, Any]) -> DecodingOptions:
    """Remove the decoding options from `values` and return them as one object."""
    from repvgg_deploy.images.decoding import DecodingOptions

    return DecodingOptions(values.pop("workers"), values.pop("max_image_mib") << 20, values.pop("decoder"))


def read_labels(path: Path | None) -> tuple[str, ...] | None:
    """The class names in the file of `--labels`, one per line.

    Raises:
        DeployError: the file cannot be read, is not UTF-8, or has an empty line.
    """
    if path is None:
        return None
    from repvgg_deploy.files.typed_values import read_file

    hint = "give a text file with one class per line"
    try:
        # A byte order mark, as some editors write it, is not part of the first name.
        text = read_file(path, f"--labels {path}", hint).decode("utf-8-sig")
        names = [line.strip() for line in text.rstrip().splitlines()]
    except FileNotFoundError as error:
        raise DeployError(f"cannot read --labels {path}: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        raise DeployError(
            f"--labels {path} is not UTF-8 text", "save the file as UTF-8, with one class per line"
        ) from error
    if not names or not all(names):
        where = f"line {names.index('') + 1} of --labels {path}" if names else f"--labels {path}"
        raise DeployError(f"{where} is empty", "give one class per line, in the order of the model's outputs")
    return tuple(names)
