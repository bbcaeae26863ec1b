"""What the files of this program say of their net beside its tensors: the settings that no tensor tells, as JSON.

A file made from a checkpoint with a configuration would otherwise be read as a net with the strides, the activation and
the preprocessing that are usual.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from msgspec import Meta

from repvgg_deploy.artifacts import ColorOrder, Interpolation, PreprocessingOptions
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.typed_values import Line, convert, parse_json
from repvgg_deploy.nets.settings import NO_SETTINGS, Settings, StructureOptions

KEY = "repvgg_deploy.settings"
"""Where they are in the metadata of a `.safetensors` file."""

_Side = Annotated[int, Meta(ge=1, le=8192)]
_Numbers = Annotated[tuple[float, ...], Meta(min_length=1, max_length=16)]


@dataclass(frozen=True)
class _Written:
    strides: Annotated[tuple[Annotated[int, Meta(ge=1, le=4)], ...], Meta(min_length=3, max_length=16)] | None = None
    activation: Line | None = None
    bn_eps: Annotated[float, Meta(ge=1e-12, le=0.1)] | None = None
    size: tuple[_Side, _Side] | None = None
    resize: _Side | None = None
    mean: _Numbers | None = None
    std: _Numbers | None = None
    interpolation: Interpolation | None = None
    color_order: ColorOrder | None = None
    crop_ratio: Annotated[float, Meta(gt=0, le=1)] | None = None


def settings_metadata(structure: StructureOptions, images: PreprocessingOptions) -> dict[str, str]:
    """What is said, as the metadata of a file; nothing if nothing is said."""
    said = {**asdict(structure), **asdict(images)}
    # The head of the file has one layer, between which nothing stands.
    del said["head_activation"]
    said = {name: value for name, value in said.items() if value is not None}
    return {KEY: json.dumps(said)} if said else {}


def read_written(text: Any) -> Settings:
    """The settings in such a text; none where it is something else or damaged, as others may use the same key."""
    if not isinstance(text, str):
        return NO_SETTINGS
    try:
        found = convert(parse_json(text.encode("utf-8", "replace"), KEY, ""), _Written, KEY, "")
        structure = StructureOptions(found.strides, found.activation, found.bn_eps)
        images = PreprocessingOptions(
            found.size, found.resize, found.mean, found.std, found.interpolation, found.color_order, found.crop_ratio
        )
    except DeployError:
        return NO_SETTINGS
    return Settings("", structure, images)
