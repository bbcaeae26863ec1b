"""`load_checkpoint`: the tensors of a RepVGG under canonical names, and the architecture that they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from repvgg_deploy.checkpoints.architecture import infer_spec, name_nearest
from repvgg_deploy.checkpoints.containers import Contents, StateDict, read_file
from repvgg_deploy.checkpoints.known_layouts import LAYOUTS
from repvgg_deploy.checkpoints.layout import KeyMap
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files import hash_file
from repvgg_deploy.nets.cards import describe, find_card
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.spec import ArchSpec
from repvgg_deploy.threads import start_workers

# A key that tells another network: what a user is likely to have mixed up.
_OTHERS = (
    (r"^stages\.\d+\.\d+\.conv_kxk\.\d+\.", "a MobileOne (timm)"),
    (r"^stage\d+\.\d+\.rbr_conv\.\d+\.", "a MobileOne"),
    (r"^layer1\.0\.conv\d\.weight", "a ResNet"),
    (r"^conv_stem\.weight|^blocks\.\d+\.\d+\.(conv_pw|conv_dw)", "an EfficientNet or MobileNet (timm)"),
    (r"^patch_embed\.|^conv_proj\.|\.attn\.qkv\.", "a vision transformer"),
    (r"^downsample_layers\.|\.conv_dw\.weight.*|\.dwconv\.weight", "a ConvNeXt"),
    (
        r"^features\.\d+\.conv\.|^features\.\d+\.0\.weight|^features\.\d+\.block",
        "a torchvision MobileNet or EfficientNet",
    ),
    (r"^features\.\d+\.weight", "a VGG"),
    (r"ERBlock_|^detect\.|^neck\.", "a YOLOv6 detector"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A RepVGG read from a file: canonical names to tensors, and what they are.

    `tensors` may be memory-mapped from the file. `notes` are things that a user should know of the file.
    """

    path: Path
    sha256: str
    layout: str
    spec: ArchSpec
    tensors: Mapping[str, Tensor]
    is_ema: bool
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]

    @property
    def arch(self) -> str:
        """The card's name, or a description of a custom architecture."""
        return describe(self.spec)

    @property
    def form(self) -> str:
        """`train` or `deploy`."""
        return self.spec.form

    def without_tensors(self) -> Checkpoint:
        """All that is known of the file, but not its weights: they need not stay in memory for it."""
        return replace(self, tensors={})


def load_checkpoint(
    path: str | Path, arch: str | None = None, ema: bool | None = None, bn_eps: float = 1e-5
) -> Checkpoint:
    """The RepVGG in a checkpoint file of any supported library, in training or deploy form.

    Args:
        path: a `.pth`, `.pt`, `.pth.tar` or `.safetensors` file; told by its content.
        arch: the architecture that the caller expects; anything else in the file is an error.
        ema: take the EMA copy (True), the plain weights (False), or the plain ones where there are some (None).
        bn_eps: the ε of the BNs, which no checkpoint stores.

    Raises:
        CheckpointError: the file is damaged, unsafe, holds another network, lacks tensors or has surplus ones, shapes
            contradict each other, values are not finite, a variance is negative, or `arch` does not match.
    """
    path = Path(path)
    wanted = find_card(arch) if arch is not None else None
    with start_workers(1) as pool:
        # Hashing releases the interpreter lock, so it costs no time of its own beside the reading.
        contents = read_file(path)
        sha256 = pool.submit(hash_file, path)
        state, keys, notes = _choose(contents, path, ema)
        _check_storage(keys, state.tensors)
        spec = replace(infer_spec(keys, state.tensors), bn_eps=bn_eps)
        tensors = _complete(spec, keys, state.tensors)
        _check_values(tensors, keys)
        checkpoint = Checkpoint(
            path, sha256.result(), keys.layout.name, spec, tensors, state.is_ema, contents.class_names, notes
        )
    if wanted is not None and not checkpoint.arch.startswith(wanted.name + " ") and checkpoint.arch != wanted.name:
        raise CheckpointError(
            f"{path} holds {checkpoint.arch}, not {wanted.name}",
            "leave --arch out, or give the checkpoint that you meant",
        )
    if checkpoint.class_names is not None and len(checkpoint.class_names) != spec.classes:
        checkpoint = replace(checkpoint, class_names=None)
    return checkpoint


def build(checkpoint: Checkpoint) -> RepVGG:
    """The net that a checkpoint holds, in evaluation mode, in the form that the file has.

    The net shares the checkpoint's tensors: nothing is copied, except where half precision becomes float32.
    """
    with torch.device("meta"):
        net = RepVGG(checkpoint.spec)
    tensors = dict(checkpoint.tensors)
    counters = {name: torch.tensor(0) for name in net.state_dict() if name.endswith("num_batches_tracked")}
    net.load_state_dict(counters | tensors, assign=True)
    return net.requires_grad_(False).eval()


def _choose(contents: Contents, path: Path, ema: bool | None) -> tuple[StateDict, KeyMap, tuple[str, ...]]:
    """The state dict to take, and its keys under the layout that knows the most of them."""
    named = [(state, _best_layout(state.tensors)) for state in contents.state_dicts]
    usable = [(state, keys) for state, keys in named if _is_repvgg(state, keys)]
    if not usable:
        raise _not_a_repvgg(path, contents)
    plain = [pair for pair in usable if not pair[0].is_ema]
    averaged = [pair for pair in usable if pair[0].is_ema]
    if ema and not averaged:
        raise CheckpointError(f"{path} holds no EMA copy of the weights", "leave --ema out")
    if ema is False and not plain:
        raise CheckpointError(f"{path} holds nothing but an EMA copy of the weights", "leave --no-ema out")
    main = [pair for pair in averaged if pair[0].is_main and ema is None]
    # Optimizers keep tensors under the same names; the weights are the largest set.
    state, keys = max(main or (averaged if ema or not plain else plain), key=lambda pair: len(pair[1].names))
    notes = []
    if main and plain:
        notes.append("the weights are an EMA copy; --no-ema takes those that were averaged")
    elif ema is None and plain and averaged:
        notes.append("the file holds an EMA copy as well; --ema takes it")
    if ema is None and not plain:
        notes.append("the file holds an EMA copy only; it was taken")
    dropped = [key for key in state.tensors if re.search(keys.layout.ignored, key)]
    if dropped:
        notes.append(f"{len(dropped)} tensors that only training needs were left out ({dropped[0]}, …)")
    return state, keys, tuple(notes)


def _is_repvgg(state: StateDict, keys: KeyMap) -> bool:
    """Whether the stem is there; or most of the rest, so that the stem can be said to be missing."""
    blocks = [name for name in keys.names.values() if name.startswith("stages.")]
    return any(name.startswith("stages.0.0.") for name in blocks) or 2 * len(blocks) > len(state.tensors)


def _best_layout(keys: Iterable[str]) -> KeyMap:
    keys = list(keys)
    maps = [layout.name_keys(keys) for layout in LAYOUTS]
    return max(maps, key=lambda found: len(found.names))


def _not_a_repvgg(path: Path, contents: Contents) -> CheckpointError:
    keys = [key for state in contents.state_dicts for key in state.tensors]
    if not keys:
        return CheckpointError(f"{path} holds no tensors by name", "save the model's state_dict()")
    known = next((name for pattern, name in _OTHERS if any(re.search(pattern, key) for key in keys)), None)
    looks = f"it looks like {known}" if known else f"its first tensors are {', '.join(keys[:3])}"
    names = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    return CheckpointError(f"{path} holds no RepVGG: {looks}", f"layouts that are known: {names}")


def _complete(spec: ArchSpec, keys: KeyMap, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under canonical names, if they are just those that `spec` consists of."""
    with torch.device("meta"):
        expected = {k: v for k, v in RepVGG(spec).state_dict().items() if not k.endswith("num_batches_tracked")}
    tensors = {canonical: found[key] for key, canonical in keys.names.items() if not keys.layout.is_ignored(key)}
    missing = [keys.file_key(name) for name in expected if name not in tensors]
    surplus = [keys.file_key(name) for name in tensors if name not in expected]
    surplus += [key for key in found if key not in keys.names and not keys.layout.is_ignored(key)]
    if missing:
        are = "tensor is" if len(missing) == 1 else "tensors are"
        raise CheckpointError(f"{len(missing)} {are} missing: {_some(missing, surplus)}", _incomplete(spec))
    if surplus:
        do = "tensor does" if len(surplus) == 1 else "tensors do"
        raise CheckpointError(
            f"{len(surplus)} {do} not belong to the net: {_some(surplus, [keys.file_key(n) for n in expected])}",
            "they would be lost; remove them from the file if they are not needed",
        )
    wrong = [
        f"{keys.file_key(name)} is {tuple(tensors[name].shape)}, expected {tuple(like.shape)}"
        for name, like in expected.items()
        if tensors[name].shape != like.shape
    ]
    if wrong:
        raise CheckpointError(f"shapes contradict each other: {'; '.join(wrong[:3])}", _incomplete(spec))
    half = (torch.float16, torch.bfloat16)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
    strange = [
        keys.file_key(name) for name, t in tensors.items() if t.dtype not in (*half, torch.float32, torch.float64)
    ]
    if strange:
        raise CheckpointError(f"{strange[0]} is no floating-point tensor", "give the checkpoint before quantization")
    return {name: tensor.to(wide) for name, tensor in tensors.items()}


def _incomplete(spec: ArchSpec) -> str:
    return f"by its tensors the file is {describe(spec)} with {spec.classes} classes; it may be incomplete"


def _some(names: list[str], candidates: list[str]) -> str:
    return ", ".join(name_nearest(name, candidates) for name in names[:3]) + (", …" if len(names) > 3 else "")


def _check_storage(keys: KeyMap, tensors: Mapping[str, Tensor]) -> None:
    """Nothing, if each tensor of the net is an array of numbers; so that all code behind this may take it for one."""
    for key in keys.names:
        tensor = tensors[key]
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{key} is a sparse or quantized tensor", "save the weights as plain tensors, before quantization"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{key} has a shape, but no values", "save the model with its weights loaded")
        if not keys.layout.is_ignored(key) and (tensor.ndim == 0 or tensor.numel() == 0):
            raise CheckpointError(f"{key} is empty: its shape is {tuple(tensor.shape)}", "the file is damaged")


def _check_values(tensors: Mapping[str, Tensor], keys: KeyMap) -> None:
    for name, tensor in tensors.items():
        low, high = (value.item() for value in torch.aminmax(tensor))
        if not -float("inf") < low <= high < float("inf"):
            raise CheckpointError(
                f"{keys.file_key(name)} holds NaN or Inf", "the training diverged; take an earlier checkpoint"
            )
        if name.endswith("running_var") and low < 0:
            raise CheckpointError(
                f"{keys.file_key(name)} has a negative variance ({low:g})",
                "the file is damaged, or was averaged wrongly",
            )
