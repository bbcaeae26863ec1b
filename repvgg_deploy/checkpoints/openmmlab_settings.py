"""What a configuration of mmengine, mmpretrain or mmcls says of a RepVGG and its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repvgg_deploy.artifacts import ColorOrder, PreprocessingOptions
from repvgg_deploy.checkpoints.settings_values import (
    as_activation,
    as_interpolation,
    as_mean_and_std,
    as_number,
    as_size,
    as_strides,
    walk_dicts,
)
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.nets.settings import NO_SETTINGS, Settings, StructureOptions

_STEM_STRIDE = 2
_UNSUPPORTED = "only RepVGGs without it can be exported"


def read_openmmlab(config: Mapping[str, Any]) -> Settings:
    """The settings in a configuration's top-level names; nothing where no RepVGG is in it.

    Raises:
        CheckpointError: the backbone has dilated convolutions, or parts that no RepVGG has.
    """
    backbone = next((item for item in walk_dicts(config.get("model")) if _type(item) == "RepVGG"), None)
    if backbone is None:
        return NO_SETTINGS
    dilations = backbone.get("dilations")
    if isinstance(dilations, list) and any(dilation != 1 for dilation in dilations):
        raise CheckpointError(f"the net's configuration sets the dilations {dilations}", _UNSUPPORTED)
    if backbone.get("add_ppf"):
        raise CheckpointError("the net's configuration sets a pyramid pooling after its last stage", _UNSUPPORTED)
    strides = as_strides(backbone.get("strides"))
    norm = backbone.get("norm_cfg")
    structure = StructureOptions(
        # The stem's is fixed in mmpretrain, and not among them.
        None if strides is None else (_STEM_STRIDE, *strides),
        as_activation(backbone.get("act_cfg")),
        as_number(norm.get("eps"), 1e-12, 0.1) if isinstance(norm, Mapping) else None,
    )
    return Settings("", structure, _preprocessing(config))


def _type(item: Mapping[str, Any]) -> str:
    return str(item.get("type", "")).rpartition(".")[2]


def _preprocessing(config: Mapping[str, Any]) -> PreprocessingOptions:
    model = config.get("model")
    inner = model.get("data_preprocessor") if isinstance(model, Mapping) else None
    places = [inner, config.get("data_preprocessor"), config.get("img_norm_cfg")]
    steps = _pipeline(config)
    places += [step for step in steps if _type(step) == "Normalize"]
    found = next((place for place in places if isinstance(place, Mapping) and "mean" in place), {})
    normalization = as_mean_and_std(found.get("mean"), found.get("std"), of_bytes=True)
    order: ColorOrder | None = None
    if normalization is not None and len(normalization[0]) == 3:
        # Images are decoded as BGR there.
        order = "rgb" if any(found.get(key) for key in ("to_rgb", "bgr_to_rgb")) else "bgr"
    resizing = next((step for step in steps if _type(step) in ("ResizeEdge", "Resize")), {})
    cropping = next((step for step in steps if _type(step) == "CenterCrop"), {})
    # mmcls 0.x writes (256, -1) for a short side of 256.
    target = as_size([n for n in _numbers(resizing.get("scale", resizing.get("size"))) if n > 0])
    crop = as_size(cropping.get("crop_size")) or target
    mean, std = normalization or (None, None)
    resize = None if target is None else min(target)
    interpolation = as_interpolation(resizing.get("interpolation"))
    return PreprocessingOptions(crop, resize, mean, std, interpolation, order)


def _numbers(value: Any) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _pipeline(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps that an image of the test set goes through."""
    for name in ("test_dataloader", "val_dataloader"):
        loader = config.get(name)
        dataset = loader.get("dataset") if isinstance(loader, Mapping) else None
        steps = dataset.get("pipeline") if isinstance(dataset, Mapping) else None
        if isinstance(steps, list):
            return [step for step in steps if isinstance(step, Mapping)]
    data = config.get("data")
    test = data.get("test") if isinstance(data, Mapping) else None
    steps = test.get("pipeline") if isinstance(test, Mapping) else config.get("test_pipeline")
    return [step for step in steps if isinstance(step, Mapping)] if isinstance(steps, list) else []
