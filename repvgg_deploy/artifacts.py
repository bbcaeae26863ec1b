"""The values that flow between the stages of the pipeline, all of them frozen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from numpy.typing import NDArray

from repvgg_deploy.errors import DeployError

Array = NDArray[Any]
"""An array of any shape and type, on the host."""


class Precision(StrEnum):
    """Number format of the convolutions: it is carried by the ONNX graph, never by a builder's flag."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the input tensor: short side to `resize`, centre crop, scale to 0–1, normalize.

    `resize`, `height` and `width` are pixels; `mean` and `std` are per channel, of values between 0 and 1.
    """

    height: int = 224
    width: int = 224
    resize: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def to_json(self) -> str:
        """The same values as one line of JSON, for the metadata of a graph."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


@dataclass(frozen=True)
class PreprocessingOptions:
    """What a user said of the preprocessing; None where the model's metadata or card decides."""

    size: tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def apply(self, base: Preprocessing) -> Preprocessing:
        """`base` with what the user said in its place.

        A size without a resize means no cropping beyond the aspect ratio, as the official code evaluates at sizes
        other than 224.

        Raises:
            DeployError: mean and std have different numbers of values, or a std is not positive.
        """
        changed = base
        if self.size is not None and self.size != (base.height, base.width):
            changed = replace(changed, height=self.size[0], width=self.size[1], resize=max(self.size))
        if self.resize is not None:
            changed = replace(changed, resize=self.resize)
        changed = replace(changed, mean=self.mean or changed.mean, std=self.std or changed.std)
        if len(changed.mean) != len(changed.std):
            raise DeployError(
                f"mean has {len(changed.mean)} values and std {len(changed.std)}", "give --mean and --std together"
            )
        if min(changed.std) <= 0 or min(changed.height, changed.width, changed.resize) < 1:
            raise DeployError("std, size and resize must be positive", "check the preprocessing options")
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
    arch: str
    layout: str
    form: str
    precision: Precision
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    tools: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
