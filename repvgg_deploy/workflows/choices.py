"""The settings that no tensor determines, what decided each, and warnings about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repvgg_deploy.artifacts import Preprocessing, PreprocessingOptions
from repvgg_deploy.checkpoints import Checkpoint
from repvgg_deploy.nets.cards import match_card
from repvgg_deploy.nets.preprocessing import is_assumed, preprocessing_origins
from repvgg_deploy.nets.settings import ASSUMED

Choices = dict[str, dict[str, Any]]
"""For each setting, by name, its `value` and its `source`."""

_ORDER = ("strides", "activation", "bn_eps", "size", "resize", "mean", "std", "interpolation", "color_order")


def describe_choices(checkpoint: Checkpoint, preprocessing: Preprocessing, options: PreprocessingOptions) -> Choices:
    """All that was chosen for a checkpoint, ready for metadata and JSON."""
    spec = checkpoint.spec
    values: dict[str, Any] = {
        "strides": list(spec.strides),
        "activation": str(spec.activation),
        "bn_eps": spec.bn_eps,
        "size": [preprocessing.height, preprocessing.width],
        "resize": preprocessing.resize,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": preprocessing.interpolation,
        "color_order": preprocessing.color_order,
    }
    origins = {**checkpoint.origins, **preprocessing_origins(spec, options, checkpoint.settings)}
    return {name: {"value": value, "source": origins[name]} for name, value in values.items()}


def recorded_choices(value: object) -> Choices:
    """The choices in the metadata of a graph or an engine; none where they are not what an export records."""
    if not isinstance(value, dict) or not {"size", "resize"} <= value.keys():
        return {}
    if not all(isinstance(choice, dict) and choice.keys() == {"value", "source"} for choice in value.values()):
        return {}
    if not isinstance(value["size"]["value"], list):
        return {}
    # Metadata are sorted by name.
    return {name: value[name] for name in (*_ORDER, *value) if name in value}


def list_choices(choices: Choices) -> dict[str, str]:
    """The choices as a table's lines: the value, and what decided it."""
    if not choices:
        return {}
    shown = {name: _show(choice["value"]) for name, choice in choices.items()}
    shown["size"] = "x".join(map(str, choices["size"]["value"])) + " px"
    shown["resize"] = f"short side to {choices['resize']['value']} px, then a centre crop"
    return {name: f"{text} ({choices[name]['source']})" for name, text in shown.items()}


def list_settings(choices: Choices) -> dict[str, str]:
    """The value of each choice as text, whatever decided it."""
    return {name: _show(choice["value"]) for name, choice in choices.items()}


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(f"{item:.6g}" if isinstance(item, int | float) else str(item) for item in value)
    return str(value)


def warn_of_choices(
    checkpoint: Checkpoint, preprocessing: Preprocessing, options: PreprocessingOptions
) -> Iterator[str]:
    """Warnings about assumed settings that are likely to be wrong."""
    spec = checkpoint.spec
    origins = preprocessing_origins(spec, options, checkpoint.settings)
    card = match_card(spec)
    usual = card.classes if card is not None else 1000
    height, width = preprocessing.height, preprocessing.width
    if spec.classes not in (0, usual) and is_assumed(origins["size"]):
        whose = f"its card {card.name}" if card is not None else "ImageNet"
        yield (
            f"the net has {spec.classes} classes, not {usual} like {whose}: its images may have had another size than"
            f" {height}x{width} px, and another mean and std; give --size, --mean and --std"
        )
    for stride in spec.strides:
        height, width = -(-height // stride), -(-width // stride)
    if checkpoint.origins.get("strides") == ASSUMED and max(height, width) <= 1:
        yield (
            f"with the strides assumed, {preprocessing.height}x{preprocessing.width} px are a single pixel after the"
            f" last stage; nets for small images often have others: --strides 1,1,2,2,2"
        )
