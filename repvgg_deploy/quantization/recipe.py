"""A recipe: which methods of quantization run, with which options. Data, read from `calibration/*.toml`."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files import data_folder
from repvgg_deploy.quantization.augmentation import MOST_AUGMENTATIONS


@dataclass(frozen=True)
class ScaleOptions:
    """How activation scales are chosen: by the clipping threshold whose layer output is nearest to the float net's.

    `thresholds` are the shares of the largest value that are tried.
    """

    thresholds: tuple[float, ...] = (0.55, 0.65, 0.75, 0.85, 1.0)


@dataclass(frozen=True)
class RoundingOptions:
    """How weights are refitted to the float net's output and rounded with error feedback.

    Attributes:
        images: at most so many calibration images, each augmentation counted, are kept in memory for it.
        samples: pixels of the input of a layer, over all images.
        damping: what is added to the diagonal of the inputs' covariance, in shares of its mean, for as many samples as
            a kernel has weights; fewer samples raise it, more lower it.
    """

    images: int = 512
    samples: int = 16384
    damping: float = 1.0


@dataclass(frozen=True)
class LearningOptions:
    """Learned rounding, scales and biases: descent on the distance of logits and features to the float net's.

    `steps` 0 turns it off. `rate` is in steps of the weights' integers.
    """

    steps: int = 0
    batch: int = 32
    rate: float = 0.02
    features: float = 1.0


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

    count: int = 256
    batch: int = 64
    steps: int = 150
    rate: float = 0.05
    multiply_adds: float = 20.0


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
    """

    name: str
    count: int = 512
    seed: int = 0
    augmentations: int = 1
    dead_inputs: float | None = 1e-3
    equalize: float | None = 0.5
    scales: ScaleOptions = field(default_factory=ScaleOptions)
    rounding: RoundingOptions = field(default_factory=RoundingOptions)
    learning: LearningOptions = field(default_factory=LearningOptions)
    pictures: PictureOptions = field(default_factory=PictureOptions)


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
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = data_folder("calibration") / f"{name_or_path}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        names = ", ".join(sorted(p.stem for p in data_folder("calibration").glob("*.toml")))
        raise DeployError(f"there is no recipe {name_or_path}", f"one of: {names}; or a TOML file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DeployError(f"the recipe {path} cannot be read: {error}", "calibration/ has examples") from error
    values.setdefault("name", path.stem)
    recipe: Recipe = _read(Recipe, values, path)
    _check(recipe, path)
    return recipe


_TABLES = {"scales": ScaleOptions, "rounding": RoundingOptions, "learning": LearningOptions, "pictures": PictureOptions}


def _read(kind: type[Any], values: dict[str, Any], path: Path) -> Any:
    known = {item.name for item in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise DeployError(f"the recipe {path} has an unknown key {key!r}", f"known: {', '.join(sorted(known))}")
    read: dict[str, Any] = {}
    for key, value in values.items():
        if kind is Recipe and key in _TABLES:
            read[key] = _read(_TABLES[key], value, path)
        elif value is False and key in ("dead_inputs", "equalize"):
            read[key] = None
        else:
            read[key] = tuple(value) if isinstance(value, list) else value
    return kind(**read)


def _check(recipe: Recipe, path: Path) -> None:
    wrong = [
        ("scales.thresholds", recipe.scales.thresholds, all(0 < t <= 1 for t in recipe.scales.thresholds)),
        ("rounding.damping", recipe.rounding.damping, recipe.rounding.damping > 0),
        ("augmentations", recipe.augmentations, recipe.augmentations in range(1, MOST_AUGMENTATIONS + 1)),
        ("count", recipe.count, recipe.count > 0),
        ("pictures.count", recipe.pictures.count, recipe.pictures.count > 0),
        ("pictures.batch", recipe.pictures.batch, recipe.pictures.batch > 0),
        ("pictures.steps", recipe.pictures.steps, recipe.pictures.steps > 0),
        ("equalize", recipe.equalize, recipe.equalize is None or 0 <= recipe.equalize <= 1),
    ]
    for key, value, right in wrong:
        if not right:
            raise DeployError(f"the recipe {path} has {key} = {value!r}", "see docs/int8.md for what each key takes")
