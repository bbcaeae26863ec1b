"""How images become the input of a net, where its file does not say."""

from __future__ import annotations

from dataclasses import replace

from repvgg_deploy.artifacts import Preprocessing, PreprocessingOptions
from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.cards import match_card
from repvgg_deploy.nets.spec import ArchSpec


def choose_preprocessing(spec: ArchSpec, options: PreprocessingOptions) -> Preprocessing:
    """The preprocessing of a net: the user's, else its card's, else that of all ImageNet RepVGGs.

    Where the net does not take three channels and the user gave no mean, it is 0.5 ± 0.5 a channel.
    """
    card = match_card(spec)
    base = card.preprocessing if card is not None else Preprocessing()
    channels = spec.in_channels
    if channels != len(base.mean):
        base = replace(base, mean=(0.5,) * channels, std=(0.5,) * channels)
    chosen = options.apply(base)
    require_channels(chosen, channels)
    return chosen


def require_channels(preprocessing: Preprocessing, channels: int | None) -> None:
    """Raise DeployError if `preprocessing` is not for a net of that many channels; None is any number."""
    if channels is not None and channels != len(preprocessing.mean):
        raise DeployError(
            f"mean and std have {len(preprocessing.mean)} values, the net takes {channels} channels",
            "give --mean and --std, one value a channel",
        )
