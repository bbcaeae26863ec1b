"""How images become the input of a net: as its user says, else its configuration, else its card."""

from __future__ import annotations

from dataclasses import fields, replace

from repvgg_deploy.artifacts import Preprocessing, PreprocessingOptions
from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.cards import match_card
from repvgg_deploy.nets.settings import ASSUMED, NO_SETTINGS, OPTION, Origins, Settings
from repvgg_deploy.nets.spec import ArchSpec

_CARD = "card of "


def choose_preprocessing(
    spec: ArchSpec, options: PreprocessingOptions, settings: Settings = NO_SETTINGS
) -> Preprocessing:
    """The preprocessing of a net: the user's, else its configuration's, else its card's, else ImageNet's.

    Where the net does not take three channels and nobody gave a mean, it is 0.5 ± 0.5 per channel.

    Raises:
        DeployError: the values contradict one another, or the net.
    """
    card = match_card(spec)
    base = card.preprocessing if card is not None else Preprocessing()
    if spec.in_channels != len(base.mean):
        base = replace(base, mean=(0.5,) * spec.in_channels, std=(0.5,) * spec.in_channels)
    chosen = options.apply(settings.preprocessing.apply(base))
    require_channels(chosen, spec.in_channels)
    return chosen


def preprocessing_origins(spec: ArchSpec, options: PreprocessingOptions, settings: Settings = NO_SETTINGS) -> Origins:
    """What decided each part of what `choose_preprocessing` gives: size, resize, mean, std, interpolation, colours."""
    card = match_card(spec)
    first = f"{_CARD}{card.name}" if card is not None and spec.in_channels == 3 else ASSUMED
    names = [field.name for field in fields(PreprocessingOptions) if field.name != "crop_ratio"]
    origins = dict.fromkeys(names, first)
    for source_of, said in ((settings.source_of, settings.preprocessing), (lambda _: OPTION, options)):
        given = {name: source_of(name) for name in names if getattr(said, name) is not None}
        if said.resize is None and (said.crop_ratio is not None or said.size is not None):
            given["resize"] = source_of("crop_ratio" if said.crop_ratio is not None else "size")
        origins |= given
    return origins


def is_assumed(origin: str) -> bool:
    """Whether neither the user nor a configuration decided what has this origin."""
    return origin == ASSUMED or origin.startswith(_CARD)


def require_channels(preprocessing: Preprocessing, channels: int | None) -> None:
    """Raise DeployError if `preprocessing` is not for a net of that many channels; None is any number."""
    if channels is not None and channels != len(preprocessing.mean):
        raise DeployError(
            f"mean and std have {len(preprocessing.mean)} values, but the net takes {channels} channels",
            "give --mean and --std, one value per channel",
        )
