"""What no tensor tells of a net: strides, activation, BN epsilon; by option, by configuration, or by convention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.activations import parse_activation
from repvgg_deploy.nets.spec import ArchSpec

Origins = Mapping[str, str]
"""For each setting, by name, what decided it: `option`, a configuration, a card, or that it was assumed."""

OPTION = "option"
ASSUMED = "assumed"


@dataclass(frozen=True)
class StructureOptions:
    """What somebody says of the parts of a net that leave no tensor; None if nothing is said.

    `strides` are those of the stages' first blocks, `activation` is a name as `parse_activation` takes it.
    `head_activation` stands between the linear layers of a head that has several; the tensors are read by it.
    """

    strides: tuple[int, ...] | None = None
    activation: str | None = None
    bn_eps: float | None = None
    head_activation: Literal["relu", "none"] | None = None

    def apply(self, spec: ArchSpec) -> ArchSpec:
        """`spec` with what is said here in its place.

        Raises:
            DeployError: the strides contradict the stages, or there is no such activation.
        """
        if self.strides is not None:
            spec = spec.with_strides(self.strides)
        if self.activation is not None:
            spec = replace(spec, activation=parse_activation(self.activation))
        return spec if self.bn_eps is None else replace(spec, bn_eps=self.bn_eps)

    def over(self, other: StructureOptions) -> StructureOptions:
        """What is said here, and what `other` says of the rest."""
        return StructureOptions(
            self.strides if self.strides is not None else other.strides,
            self.activation if self.activation is not None else other.activation,
            self.bn_eps if self.bn_eps is not None else other.bn_eps,
            self.head_activation if self.head_activation is not None else other.head_activation,
        )


def recorded_structure(choices: object) -> StructureOptions:
    """What the metadata of a graph (`assumed`) record of the net that it was made from; nothing where they do not."""
    if not isinstance(choices, Mapping):
        return StructureOptions()
    found = {name: choice.get("value") for name, choice in choices.items() if isinstance(choice, Mapping)}
    strides, activation, bn_eps = (found.get(name) for name in ("strides", "activation", "bn_eps"))
    return StructureOptions(
        tuple(strides) if isinstance(strides, list) and all(isinstance(stride, int) for stride in strides) else None,
        activation if isinstance(activation, str) else None,
        bn_eps if isinstance(bn_eps, float) else None,
    )


@dataclass(frozen=True)
class Settings:
    """What a configuration beside the weights says of the net and of its images.

    Attributes:
        source: of it, as a message names it: `config.json`, `the checkpoint's configuration`.
        structure: see `StructureOptions`.
        preprocessing: see `PreprocessingOptions`.
        class_names: in the order of the outputs.
        notes: what a user should know of the configuration.
        sources: of single settings by name, where they are not all of `source`.
    """

    source: str = ""
    structure: StructureOptions = field(default_factory=StructureOptions)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def source_of(self, name: str) -> str:
        """What a setting comes from."""
        return self.sources.get(name, self.source)

    def said(self) -> set[str]:
        """The names of the settings of which something is said."""
        parts = (self.structure, self.preprocessing)
        return {f.name for part in parts for f in fields(part) if getattr(part, f.name) is not None}

    def over(self, other: Settings) -> Settings:
        """What is said here, and what `other` says of the rest."""
        sources = {name: other.source_of(name) for name in other.said()}
        sources |= {name: self.source_of(name) for name in self.said()}
        return Settings(
            self.source or other.source,
            self.structure.over(other.structure),
            self.preprocessing.over(other.preprocessing),
            self.class_names or other.class_names,
            (*self.notes, *other.notes),
            sources,
        )


NO_SETTINGS = Settings()


def fit_settings(settings: Settings, spec: ArchSpec) -> Settings:
    """`settings` less what cannot be of this net; a note tells what was left out.

    One stride less than there are stages is taken for those after the stem, whose own is 2 then.
    """
    said, images, notes = settings.structure, settings.preprocessing, list(settings.notes)
    if said.strides is not None and len(said.strides) == len(spec.stages) - 1:
        said = replace(said, strides=(2, *said.strides))
    try:
        StructureOptions(strides=said.strides).apply(spec)
    except DeployError as error:
        notes.append(f"{settings.source} gives strides that were not used: {error.message}")
        said = replace(said, strides=None)
    try:
        StructureOptions(activation=said.activation).apply(spec)
    except DeployError as error:
        notes.append(f"{settings.source} gives an activation that was not used: {error.message}; give --act")
        said = replace(said, activation=None)
    if images.mean is not None and len(images.mean) != spec.in_channels:
        images = replace(images, mean=None, std=None)
    return replace(settings, structure=said, preprocessing=images, notes=tuple(notes))


def structure_origins(options: StructureOptions, settings: Settings) -> Origins:
    """What decided the strides, the activation and the BNs' epsilon."""
    origins = {}
    for name in ("strides", "activation", "bn_eps"):
        if getattr(options, name) is not None:
            origins[name] = OPTION
        elif getattr(settings.structure, name) is not None:
            origins[name] = settings.source_of(name)
        else:
            origins[name] = ASSUMED
    return origins
