"""State dicts under the names that the official code or timm loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.checkpoints.known_layouts import (
    HOLOCRON,
    OFFICIAL,
    OFFICIAL_PLUS,
    QAREPVGG_V1,
    QAREPVGG_V2,
    REPOPTIMIZERS,
    TIMM,
)
from repvgg_deploy.checkpoints.layout import KeyMap, Layout
from repvgg_deploy.checkpoints.loading import Checkpoint
from repvgg_deploy.checkpoints.written_settings import settings_metadata
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.settings import ASSUMED, StructureOptions
from repvgg_deploy.nets.spec import ArchSpec


def name_state_dict(net: RepVGG, layout: str) -> dict[str, Tensor]:
    """The tensors of `net`, in either form, under the names of a layout: `official`, `timm`, `holocron` or, in
    training form, `repoptimizers`.

    A net with squeeze-excites after the ReLU gets RepVGGplus' names, stage 3 in two halves; QARepVGG's training form
    has the official names and those of its BN after the sum.

    Raises:
        CheckpointError: the layout has no place for a part of the net.
    """
    if net.spec.hidden:
        raise CheckpointError(
            f"the {layout} layout has no name for a head of several layers", "export it to ONNX, which needs no layout"
        )
    keys = _key_map(net.spec, layout)
    state = {}
    for name, tensor in net.state_dict().items():
        if (
            not name.startswith("classifier")
            and name.split(".", 3)[3].rpartition(".")[0] not in keys.layout.parts.values()
        ):
            raise CheckpointError(f"the {layout} layout has no name for {name}", "try the other --layout")
        key = keys.file_key(name)
        if key in state:
            raise CheckpointError(
                f"the {layout} layout has one block in its stem, but the net has {len(net.spec.stages[0])}",
                "export it to ONNX, which needs no layout",
            )
        state[key] = tensor.contiguous()
    return state


def _key_map(spec: ArchSpec, layout: str) -> KeyMap:
    chosen = _layout(spec, layout)
    depths = [len(stage) for stage in spec.stages]
    spans: dict[int, tuple[int, int]] = {}
    for number, segment in enumerate(chosen.segments):
        depth = depths[segment.stage] if segment.stage < len(depths) else 0
        twins = [n for n, other in enumerate(chosen.segments) if other.stage == segment.stage]
        # Of a stage in two halves the first has the smaller one, as in repvggplus.py.
        half = depth // 2 if len(twins) == 2 else 0
        spans[number] = (half, depth - half) if twins.index(number) else (0, half or depth)
    return KeyMap(chosen, {}, spans)


def _layout(spec: ArchSpec, layout: str) -> Layout:
    if layout != "official":
        return {"timm": TIMM, "holocron": HOLOCRON, "repoptimizers": REPOPTIMIZERS}[layout]
    if any(block.norm_after_sum for block in spec.blocks):
        bare = any(branch.kernel == 1 and not branch.norm for block in spec.blocks for branch in block.branches)
        return QAREPVGG_V2 if bare else QAREPVGG_V1
    after = any(b.squeeze_excite is not None and b.squeeze_excite.position == "after" for b in spec.blocks)
    return OFFICIAL_PLUS if after else OFFICIAL


def write_state_dict(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `state` as `.safetensors` or, with any other ending, as a torch zip file."""
    # Not written by the libraries themselves: on a full disk they raise errors that do not mention the disk.
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        path.write_bytes(save(dict(state), dict(metadata or {})))
    else:
        content = BytesIO()
        torch.save(dict(state), content)
        path.write_bytes(content.getbuffer())


def describe_in_metadata(checkpoint: Checkpoint, images: PreprocessingOptions | None = None) -> dict[str, str]:
    """What a `.safetensors` file made from `checkpoint` says beside its tensors: its classes, and what no tensor tells.

    Of the latter only what somebody has said: a configuration, options, or `images` of the preprocessing.
    """
    names = checkpoint.class_names
    classes = {} if names is None else {"class_names": json.dumps(list(names), ensure_ascii=False)}
    spec = checkpoint.spec
    said = {name for name, origin in checkpoint.origins.items() if origin != ASSUMED}
    structure = StructureOptions(
        spec.strides if "strides" in said else None,
        str(spec.activation) if "activation" in said else None,
        spec.bn_eps if "bn_eps" in said else None,
    )
    preprocessing = (images or PreprocessingOptions()).over(checkpoint.settings.preprocessing)
    return {**classes, **settings_metadata(structure, preprocessing)}
