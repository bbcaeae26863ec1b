"""What the configuration of a checkpoint says of its net and images: inside the file, or `config.json` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from repvgg_deploy.checkpoints.openmmlab_settings import read_openmmlab
from repvgg_deploy.checkpoints.plain_trees import as_tree
from repvgg_deploy.checkpoints.python_config import read_python_config
from repvgg_deploy.checkpoints.settings_values import (
    as_activation,
    as_interpolation,
    as_list,
    as_mean_and_std,
    as_names,
    as_number,
    as_size,
    as_strides,
    find_value,
    options_of,
    walk_dicts,
)
from repvgg_deploy.checkpoints.written_settings import KEY, read_written
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.typed_values import read_file
from repvgg_deploy.nets.cards import find_named_card
from repvgg_deploy.nets.settings import NO_SETTINGS, Settings, StructureOptions

IN_FILE = "the checkpoint's configuration"
IN_MODULES = "the pickled modules"
_MAX_JSON = 8 << 20

_STRIDES = ("strides", "stagestrides", "blockstrides", "downsamplestrides", "stride")
_ACTIVATIONS = ("actcfg", "actlayer", "activation", "activationlayer", "activationfn", "act", "actname", "nonlinearity")
_BN_EPS = ("bneps", "normeps", "batchnormeps", "bnepsilon")
_SIZES = ("testsize", "valsize", "evalsize", "imgsize", "imagesize", "inputsize", "inputresolution", "resolution")
_CROPS = ("valcropsize", "testcropsize", "cropsize")
_RESIZES = ("valresizesize", "testresize", "resizesize", "resize")
_CROP_RATIOS = ("croppct", "cropratio")
_MEANS = ("mean", "imagemean", "imgmean", "pixelmean", "normmean", "datamean")
_STDS = ("std", "imagestd", "imgstd", "pixelstd", "normstd", "datastd")
_INTERPOLATIONS = ("interpolation", "testinterpolation", "valinterpolation", "resample")
_LABELS = ("labelnames", "classnames", "id2label")
# The official trainer names its data set, and normalizes CIFAR-100 by its own mean and std.
_CIFAR100 = ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047))


def read_settings(
    path: Path, configuration: Mapping[str, Any], card: str | None, modules: StructureOptions
) -> Settings:
    """All that is said beside the weights; what the file itself says goes before what lies beside it.

    Args:
        path: the checkpoint.
        configuration: plain data, see `Checkpoint`; nothing of it is executed.
        card: the name of the architecture that the weights have, if it has one.
        modules: what the pickled modules say, where the file is a pickle of such; it goes before all else.
    """
    tree = as_tree(configuration)
    inside = _inside(tree if isinstance(tree, Mapping) else {})
    if modules != StructureOptions():
        inside = Settings(IN_MODULES, modules).over(inside)
    beside = read_config_files(path.parent, card)
    return inside.over(beside)


def _inside(configuration: Mapping[str, Any]) -> Settings:
    written = read_written(configuration.get(KEY))
    if written != NO_SETTINGS:
        return replace(written, source=IN_FILE)
    meta = configuration.get("meta")
    texts = [meta.get(key) for key in ("cfg", "config")] if isinstance(meta, Mapping) else []
    for text in texts:
        settings = read_openmmlab(read_python_config(text)) if isinstance(text, str) else NO_SETTINGS
        if settings != NO_SETTINGS:
            return replace(settings, source=IN_FILE)
    official = _read_official(configuration.get("config"))
    found = official if official is not None else read_any(configuration)
    return NO_SETTINGS if found == NO_SETTINGS else replace(found, source=IN_FILE)


def _read_official(config: Any) -> Settings | None:
    """The yacs configuration of the official trainer; see its data/build.py."""
    if not isinstance(config, Mapping) or not isinstance(config.get("DATA"), Mapping):
        return None
    data, test = config["DATA"], config.get("TEST")
    size = as_size(data.get("TEST_SIZE")) or as_size(data.get("IMG_SIZE"))
    if size is None:
        return None
    # CIFAR's images of 32 pixels are not resized there; larger ones keep the ratio of 224 px images.
    crops = isinstance(test, Mapping) and test.get("CROP") is True and max(size) > 32
    resize = int(256 / 224 * max(size)) if crops else max(size)
    is_cifar = data.get("DATASET") == "cf100"
    preprocessing = options_of(
        size, resize, _CIFAR100 if is_cifar else None, as_interpolation(data.get("INTERPOLATION"))
    )
    return replace(read_any(config), preprocessing=preprocessing)


def read_any(tree: Any) -> Settings:
    """The settings in a configuration of no known form, by the names that people give them."""
    dicts = list(walk_dicts(tree))
    structure = StructureOptions(
        find_value(dicts, _STRIDES, as_strides),
        find_value(dicts, _ACTIVATIONS, as_activation),
        find_value(dicts, _BN_EPS, lambda value: as_number(value, 1e-12, 0.1)),
    )
    # Only where both stand in one place: there are means of many things.
    pairs = (as_mean_and_std(find_value([d], _MEANS, as_list), find_value([d], _STDS, as_list)) for d in dicts)
    resize = find_value(dicts, _RESIZES, as_size)
    size = find_value(dicts, _CROPS, as_size) or find_value(dicts, _SIZES, as_size)
    preprocessing = options_of(
        size,
        resize[0] if resize is not None and size is not None and resize[0] >= max(size) else None,
        next((pair for pair in pairs if pair is not None), None),
        find_value(dicts, _INTERPOLATIONS, as_interpolation),
        find_value(dicts, _CROP_RATIOS, lambda value: as_number(value, 0.1, 1.0)),
    )
    return Settings("", structure, preprocessing, find_value(dicts, _LABELS, as_names))


def read_config_files(folder: Path, card: str | None) -> Settings:
    """What timm's and Hugging Face's JSON files in a folder say of the weights beside them, which are a `card`."""
    found = {name: _read_json(folder / name) for name in ("config.json", "preprocessor_config.json")}
    known = {name: values for name, values in found.items() if values}
    if any(_is_of_another_net(values, card) for values in known.values()):
        return NO_SETTINGS
    if not known:
        return NO_SETTINGS
    settings = read_any(list(known.values()))
    return NO_SETTINGS if settings == NO_SETTINGS else replace(settings, source=" and ".join(known))


def _is_of_another_net(values: Mapping[str, Any], card: str | None) -> bool:
    """Whether a configuration names an architecture that the weights are not."""
    for key in ("architecture", "model_type", "architectures"):
        found = values.get(key)
        for name in found if isinstance(found, list) else [found]:
            if not isinstance(name, str):
                continue
            named = find_named_card(name)
            if "repvgg" not in name.lower() or (named is not None and card is not None and named != card):
                return True
    return False


def _read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; nothing where there is none, or none that can be read."""
    try:
        values = json.loads(read_file(path, path.name, "", _MAX_JSON))
    except (OSError, DeployError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
