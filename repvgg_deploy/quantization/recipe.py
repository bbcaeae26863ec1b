"""A recipe: which methods of quantization run, with which options. Data, read from `calibration/*.toml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.files.typed_values import Line, convert, parse_toml, read_file, require_known
from repvgg_deploy.quantization.augmentation import MOST_AUGMENTATIONS

# The bounds are those of a file. They refuse what cannot work and what no machine has the memory for, not what is odd.
_Count = Annotated[int, Meta(ge=1, le=1 << 24)]
_Steps = Annotated[int, Meta(ge=0, le=1_000_000)]
_Batch = Annotated[int, Meta(ge=1, le=4096)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Threshold = Annotated[float, Meta(gt=0, le=1)]
_Rate = Annotated[float, Meta(gt=0, le=100)]
_Factor = Annotated[float, Meta(gt=0, le=1e6)]
_Weight = Annotated[float, Meta(ge=0, le=1e6)]
_HINT = "docs/int8.md says what each key takes, and calibration/ has examples"


@dataclass(frozen=True)
class ScaleOptions:
    """How activation scales are chosen: by the clipping threshold whose layer output is nearest to the float net's.

    `thresholds` are the shares of the largest value that are tried.
    """

    thresholds: Annotated[tuple[_Threshold, ...], Meta(min_length=1, max_length=100)] = (0.55, 0.65, 0.75, 0.85, 1.0)


@dataclass(frozen=True)
class RoundingOptions:
    """How weights are refitted to the float net's output and rounded with error feedback.

    Attributes:
        images: at most so many calibration images, each augmentation counted, are kept in memory for it.
        samples: pixels of the input of a layer, over all images.
        damping: what is added to the diagonal of the inputs' covariance, in shares of its mean, for as many samples as
            a kernel has weights; fewer samples raise it, more lower it.
    """

    images: _Count = 512
    samples: _Count = 16384
    damping: _Factor = 1.0


@dataclass(frozen=True)
class LearningOptions:
    """Learned rounding, scales and biases: descent on the distance of logits and features to the float net's.

    `steps` 0 turns it off. `rate` is in steps of the weights' integers.
    """

    steps: _Steps = 0
    batch: _Batch = 32
    rate: _Rate = 0.02
    features: _Weight = 1.0


@dataclass(frozen=True)
class PictureOptions:
    """How calibration images are synthesized from BN statistics, if there are no images.

    Attributes:
        count: images to synthesize; down to half as many if they can then be larger, and fewer still if the net is
            so large that they would exceed `multiply_adds`.
        batch: images that are optimized together; the statistics are those of a batch.
        steps: of Adam, for each batch.
        rate: of Adam at the start, in units of normalized images.
        multiply_adds: what all steps together may take, in 10¹²; it bounds the size and the number of the images.
    """

    count: _Count = 256
    batch: _Batch = 64
    steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 150
    rate: _Rate = 0.05
    multiply_adds: _Factor = 20.0


@dataclass(frozen=True)
class Recipe:
    """The options of one quantization.

    Attributes:
        name: of the recipe.
        count: calibration images to take.
        seed: of their choice and of every other draw.
        augmentations: variants of each image: as it is, mirrored left to right, and shifted by a few pixels; 1 to 4.
        dead_inputs: a kernel column is removed if it can add no more than this share of an output's root mean square;
            0 removes only the inputs that are always zero, and None nothing.
        equalize: the exponent of the activation's range in the equalizing scale, or None for no equalization.
        full_range: activations after a ReLU go to 255: finer, for ONNX Runtime and OpenVINO; TensorRT saturates at 127.
    """

    name: Line
    count: _Count = 512
    seed: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)] = 0
    augmentations: Annotated[int, Meta(ge=1, le=MOST_AUGMENTATIONS)] = 1
    dead_inputs: _Share | None = 1e-3
    equalize: _Share | None = 0.5
    full_range: bool = False
    scales: ScaleOptions = field(default_factory=ScaleOptions)
    rounding: RoundingOptions = field(default_factory=RoundingOptions)
    learning: LearningOptions = field(default_factory=LearningOptions)
    pictures: PictureOptions = field(default_factory=PictureOptions)


def find_recipe(name_or_path: str | Path) -> Path:
    """Where the recipe of that name in `calibration/` is, or that in a TOML file, whether it is there or not."""
    path = Path(name_or_path)
    return path if path.suffix == ".toml" else data_folder("calibration") / f"{name_or_path}.toml"


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of that name in `calibration/`, or that in a TOML file.

    Raises:
        DeployError: there is no such recipe, or it contains an unknown key or value.

    Example:
        >>> from repvgg_deploy import load_recipe
        >>> recipe = load_recipe("accurate")
        >>> recipe.count
        512
    """
    path = find_recipe(name_or_path)
    name = f"the recipe {path}"
    try:
        content = read_file(path, name, _HINT)
    except FileNotFoundError as error:
        names = ", ".join(sorted(p.stem for p in data_folder("calibration").glob("*.toml")))
        raise DeployError(f"there is no recipe {name_or_path}", f"one of: {names}; or a TOML file") from error
    values = {"name": path.stem, **parse_toml(content, name, _HINT)}
    require_known(values, Recipe, name, _HINT)
    # TOML has no value for "none".
    for key in ("dead_inputs", "equalize"):
        if values.get(key) is False:
            values[key] = None
    return convert(values, Recipe, name, _HINT)
