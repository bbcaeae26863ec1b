"""The values that flow between the stages of the pipeline, all of them frozen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Annotated, Any, Literal

from msgspec import Meta
from numpy.typing import NDArray

from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.typed_values import Line, convert, parse_json

Array = NDArray[Any]
"""An array of any shape and type, on the host."""


class Precision(StrEnum):
    """Number format of the convolutions: it is carried by the ONNX graph, never by a builder's flag.

    Example:
        >>> from repvgg_deploy import Precision
        >>> Precision("fp16") is Precision.FP16
        True
    """

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    def __str__(self) -> str:
        return self.value


Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
ColorOrder = Literal["rgb", "bgr"]
# The bounds are those of values from files.
_Pixels = Annotated[int, Meta(ge=1, le=1 << 16)]
_Means = Annotated[tuple[Annotated[float, Meta(ge=-1e6, le=1e6)], ...], Meta(min_length=1, max_length=4096)]
_Stds = Annotated[tuple[Annotated[float, Meta(gt=0, le=1e6)], ...], Meta(min_length=1, max_length=4096)]
MOST_PIXELS = 8192 * 8192
"""Of an image that a net takes: as float32 of three channels it has 768 MiB."""
_NAME, _HINT = "the preprocessing in the metadata", "export the model again"


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the input tensor: short side to `resize`, centre crop, scale to 0–1, normalize.

    `resize`, `height` and `width` are pixels; `mean` and `std` are per channel, of values between 0 and 1, in the
    order `color_order` of the channels that the net takes.

    Example:
        >>> from repvgg_deploy import Preprocessing
        >>> Preprocessing(height=160, width=160, resize=183).mean
        (0.485, 0.456, 0.406)
    """

    height: _Pixels = 224
    width: _Pixels = 224
    resize: _Pixels = 256
    mean: _Means = (0.485, 0.456, 0.406)
    std: _Stds = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"
    color_order: ColorOrder = "rgb"

    def to_json(self) -> str:
        """The same values as one line of JSON, for the metadata of a graph; `scale` is that of the pixels."""
        return json.dumps({**asdict(self), "scale": 1 / 255}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """The inverse of `to_json`.

        Raises:
            DeployError: it is not JSON, or a value is missing, of another type, or out of its bounds.
        """
        values = parse_json(text.encode("utf-8", "surrogatepass"), _NAME, _HINT)
        found = convert(values, cls, _NAME, _HINT)
        # What decides the pixels is never assumed; the rest is younger than the first graphs.
        missing = [name for name in ("height", "width", "resize", "mean", "std") if name not in dict(values)]
        if missing:
            raise DeployError(f"{_NAME}: {', '.join(missing)} missing", _HINT)
        if len(found.mean) != len(found.std):
            raise DeployError(f"{_NAME}: mean has {len(found.mean)} values and std {len(found.std)}", _HINT)
        return found


@dataclass(frozen=True)
class PreprocessingOptions:
    """What is said of the preprocessing; None if the model's metadata, configuration or card decides.

    `crop_ratio` is that of the size over `resize`, which stands in its place.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    color_order: ColorOrder | None = None
    crop_ratio: float | None = None

    @classmethod
    def same_as(cls, known: Preprocessing) -> PreprocessingOptions:
        """All that `known` says."""
        size = (known.height, known.width)
        return cls(size, known.resize, known.mean, known.std, known.interpolation, known.color_order)

    def over(self, other: PreprocessingOptions) -> PreprocessingOptions:
        """What is said here, and what `other` says of the rest."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(other, **{name: value for name, value in said.items() if value is not None})

    def apply(self, base: Preprocessing) -> Preprocessing:
        """`base` with what the user said in its place.

        A size without a resize means no cropping beyond the aspect ratio, as the official code evaluates at sizes
        other than 224.

        Raises:
            DeployError: mean and std have different numbers of values, or a value is out of range.
        """
        changed = base
        if self.size is not None and self.size != (base.height, base.width):
            changed = replace(changed, height=self.size[0], width=self.size[1], resize=max(self.size))
        if self.crop_ratio is not None:
            if not 0 < self.crop_ratio <= 1:
                raise DeployError(
                    f"the crop ratio cannot be {self.crop_ratio:g}", "the share of the short side, from 0 to 1"
                )
            # As timm rounds it.
            changed = replace(changed, resize=int(max(changed.height, changed.width) / self.crop_ratio))
        if self.resize is not None:
            changed = replace(changed, resize=self.resize)
        changed = replace(
            changed,
            mean=self.mean or changed.mean,
            std=self.std or changed.std,
            interpolation=self.interpolation or changed.interpolation,
            color_order=self.color_order or changed.color_order,
        )
        if len(changed.mean) != len(changed.std):
            raise DeployError(
                f"mean has {len(changed.mean)} values and std {len(changed.std)}", "give --mean and --std together"
            )
        if max(changed.mean) > 1:
            raise DeployError(
                f"the mean {max(changed.mean):g} is above 1, but pixels are scaled to 0..1",
                "divide mean and std of pixels to 255 by 255",
            )
        if min(changed.std) <= 0 or min(changed.height, changed.width, changed.resize) < 1:
            raise DeployError("std, size and resize must be positive", "check the preprocessing options")
        if changed.height * changed.width > MOST_PIXELS:
            raise DeployError(
                f"images of {changed.height}x{changed.width} are too large: at most {MOST_PIXELS:,} pixels",
                "a smaller size",
            )
        return changed


@dataclass(frozen=True)
class Parity:
    """How two arrays of logits differ: `candidate` against `reference`.

    `max_abs` is in logits, `relative` is ‖candidate − reference‖ / ‖reference‖, `cosine` is the smallest over the
    images, `top1_agreement` is in percent.
    """

    max_abs: float
    relative: float
    cosine: float
    top1_agreement: float
    images: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, as the command line's JSON has them."""
        return asdict(self)


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from; it travels in the metadata of the ONNX graph and beside the engine."""

    sha256: str
    arch: Line
    layout: Line
    form: Line
    precision: Precision
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    tools: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
