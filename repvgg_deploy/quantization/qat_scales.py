"""The scales of quantization-aware training: observed at the start, kept in a file, and made into a quantized net."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.typed_values import Line, Sha256
from repvgg_deploy.fusion.fuse import equivalent_kernel_bias
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.spec import ArchSpec
from repvgg_deploy.quantization.array_files import ArrayFile, save_arrays
from repvgg_deploy.quantization.bias_headroom import make_room
from repvgg_deploy.quantization.grid import Grid
from repvgg_deploy.quantization.layer_inputs import weights_of_energies
from repvgg_deploy.quantization.net import QuantizationSummary, QuantizedNet
from repvgg_deploy.quantization.pair_sums import count_taps
from repvgg_deploy.quantization.points import CLASSIFIER, POOL, fused_blocks
from repvgg_deploy.quantization.qat import LayerScales, QatOptions, QatScales, qat_layers, unsigned_inputs
from repvgg_deploy.quantization.rounding import choose_weight_scales, round_weights
from repvgg_deploy.quantization.state import LayerIntegers, Reconstruction

_KIND = "qat"
# Values of each image that are kept to choose the scale of an input, and the shares of the largest one that are tried.
_KEPT = 2048
_SHARES = tuple(2 ** (-k / 8) for k in range(40))


@torch.no_grad()
def observe_scales(model: nn.Module, batches: Iterable[Any], options: QatOptions | None = None) -> QatScales:
    """Scales to start from, for `prepare_qat`: those of least square error, of kernels and of inputs on some batches.

    Args:
        model: a module with RepVGG blocks in training form; it is run in evaluation mode, and left in its own.
        batches: inputs of `model`, one at a time: a tensor, or a tuple of arguments.
        options: as for `prepare_qat`.

    Raises:
        DeployError: there is no block, one received no batch, or a value that is not finite, or a batch is no input.
    """
    options = options or QatOptions()
    names = qat_layers(model)
    points = [*names, POOL] if isinstance(model, RepVGG) else names
    seen = _watch(model, names, batches)
    missing = [name for name in points if name not in seen]
    if missing:
        what = "no block received" if missing == points else f"{missing[0]} did not receive"
        raise DeployError(f"{what} a batch", "give at least one batch of inputs, as the model takes them")
    odd = next((name for name in points if not seen[name].is_finite), None)
    if odd is not None:
        raise DeployError(f"the activations before {odd} are not finite", "look at the batches, and at the model")
    unsigned = unsigned_inputs(model)
    layers = {}
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.weight if isinstance(layer, nn.Linear) else equivalent_kernel_bias(layer, torch.float32)[0]
        layers[name] = LayerScales(_weight_scales(weight, options), seen[name].scale(options, unsigned[name]))
    pool = seen[POOL].scale(options, unsigned[POOL]) if POOL in seen else None
    return QatScales(layers, pool, options.full_range and isinstance(model, RepVGG))


def _weight_scales(weight: Tensor, grid: Grid) -> Tensor:
    return choose_weight_scales(weight.detach().flatten(1), count_taps(weight), grid=grid)


@dataclass
class _Seen:
    """What a layer reads: of each image some values, the energy, and the largest and the smallest value."""

    values: list[Tensor] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)
    largest: list[Tensor] = field(default_factory=list)
    smallest: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        rows = x.detach().flatten(1).float()
        # Drawn, not evenly spaced: every so many values would often be one column of the image.
        generator = torch.Generator().manual_seed(len(self.values))
        chosen = torch.randint(rows.shape[1], (min(_KEPT, rows.shape[1]),), generator=generator).to(rows.device)
        self.values.append(rows[:, chosen].cpu())
        self.energies.append(rows.double().square().mean(1).cpu())
        self.largest.append(rows.abs().amax(1).cpu())
        self.smallest.append(rows.amin(1).cpu())

    @property
    def is_finite(self) -> bool:
        """Whether all values were numbers."""
        return bool(torch.isfinite(torch.cat(self.energies)).all())

    def scale(self, grid: Grid, unsigned: bool) -> float:
        """The scale of least square error, in which images with unusually strong activations count less.

        `unsigned`: whether the integers are those of an input that is never negative; see `unsigned_inputs`.
        """
        weights = weights_of_energies(torch.cat(self.energies))
        largest = float(torch.cat(self.largest)[weights >= 1].max())
        signed = float(torch.cat(self.smallest).min()) < 0
        clipping = grid.highest(unsigned)
        if largest == 0.0:
            return 1.0 / clipping
        values = torch.cat(self.values)

        def error(share: float) -> float:
            scale = largest * share / clipping
            rounded = (values / scale).round().clamp(-clipping - 1, clipping) * scale
            return float((rounded - values).double().square().sum(1) @ weights)

        # Images have as many values at the border as elsewhere.
        return largest * min((1.0,) if signed else _SHARES, key=error) / clipping


def _watch(model: nn.Module, names: list[str], batches: Iterable[Any]) -> dict[str, _Seen]:
    """What each layer reads, and the pool."""
    seen: dict[str, _Seen] = {}

    def hook(name: str) -> Any:
        return lambda _module, inputs: seen.setdefault(name, _Seen()).add(inputs[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    if isinstance(model, RepVGG):
        last = model.get_submodule(names[-2])
        handles.append(last.register_forward_hook(lambda _module, _inputs, output: hook(POOL)(None, (output,))))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            model(*_arguments(batch))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen


def _arguments(batch: Any) -> tuple[Any, ...]:
    if isinstance(batch, tuple):
        return batch
    try:
        return (torch.as_tensor(batch),)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DeployError(
            f"a batch is a {type(batch).__name__} that is no tensor",
            "a tensor, or a tuple of the model's arguments: (images for images, labels in loader)",
        ) from error


@torch.no_grad()
def apply_scales(fused: RepVGG, scales: QatScales, summary: QuantizationSummary | None = None) -> QuantizedNet:
    """The INT8 net that was trained for: kernels of `fused` over the scales, rounded; no step of calibration runs.

    Raises:
        DeployError: the scales are of another net.
    """
    layers: dict[str, LayerIntegers] = {}
    wanted: list[tuple[str, nn.Conv2d | nn.Linear]] = [(name, block.conv) for name, block in fused_blocks(fused)]
    if fused.has_classifier:
        wanted.append((CLASSIFIER, fused.classifier))
    for name, layer in wanted:
        found = scales.layers.get(name)
        if found is None or len(found.weight) != len(layer.weight):
            raise DeployError(
                f"the file has no scales for {name}, or scales for another width", "give the file that qat wrote"
            )
        taps = count_taps(layer.weight)
        rows = round_weights(layer.weight.detach().flatten(1), found.weight.to(layer.weight.device), taps)
        integers = rows.reshape(layer.weight.shape).to(torch.int8)
        layers[name] = LayerIntegers(integers, found.weight, cast(Tensor, layer.bias).detach().clone(), found.input)
    # Of a backbone that ends early, what follows its last block is the input of a block that it does not have.
    following = scales.layers.get(f"stages.{len(fused.spec.stages)}.0")
    pool = scales.pool if following is None else following.input
    if pool is None:
        raise DeployError(f"the file has no scale for {POOL}", "give the file that qat wrote")
    return QuantizedNet(fused, make_room(Reconstruction(layers, pool)), summary)


@dataclass(frozen=True)
class TrainedAs:
    """What a net was trained as that no tensor tells, as options say it; the scales are true of no other.

    Attributes:
        strides: of the stages.
        activation: of the blocks.
        bn_eps: the epsilon of the BNs.
        mean, std, color_order: of the images.
    """

    strides: Line
    activation: Line
    bn_eps: Line
    mean: Line
    std: Line
    color_order: Line

    @classmethod
    def of(cls, spec: ArchSpec, preprocessing: Preprocessing) -> TrainedAs:
        """A net of this architecture, for images prepared like this."""
        strides, mean, std = (",".join(map(repr, v)) for v in (spec.strides, preprocessing.mean, preprocessing.std))
        return cls(strides, str(spec.activation), repr(spec.bn_eps), mean, std, preprocessing.color_order)

    def differences(self, other: TrainedAs) -> dict[str, str]:
        """The values here, by name, that `other` does not have; a backbone that ends early has the first strides."""
        different = {name: value for name, value in vars(self).items() if value != getattr(other, name)}
        if f"{self.strides},".startswith(f"{other.strides},"):
            different.pop("strides", None)
        return different


@dataclass(frozen=True)
class ScalesOrigin:
    """Where learned scales come from: the recipe that training started from, its steps, its seed, and the net."""

    recipe: Line
    steps: Annotated[int, Meta(ge=0, le=1 << 32)]
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    trained_as: TrainedAs


@dataclass(frozen=True, kw_only=True)
class _About(ScalesOrigin):
    sha256: Sha256
    full_range: bool


def save_scales(scales: QatScales, path: Path, sha256: str, origin: ScalesOrigin) -> None:
    """Write the scales that belong to the checkpoint with this sha256 to an `.npz` file, with what is known of them."""
    arrays: dict[str, Any] = {}
    for name, layer in scales.layers.items():
        arrays[f"{name}/weight"] = layer.weight.cpu().numpy()
        arrays[f"{name}/input"] = np.float32(layer.input)
    if scales.pool is not None:
        arrays[f"{POOL}/input"] = np.float32(scales.pool)
    save_arrays(path, {**asdict(origin), "kind": _KIND, "sha256": sha256, "full_range": scales.full_range}, arrays)


def load_scales(path: Path, sha256: str) -> tuple[QatScales, ScalesOrigin] | None:
    """What `save_scales` wrote for the checkpoint with this sha256; None if there is no file, or one of another kind.

    Raises:
        DeployError: the file is damaged, or the scales belong to another checkpoint.
    """
    if not path.exists():
        return None
    file = ArrayFile(path, f"the calibration cache {path}", "delete it to calibrate anew, or run qat again")
    if file.kind != _KIND:
        return None
    about = file.about(_About)
    if about.sha256 != sha256:
        raise DeployError(
            f"the scales in {path} belong to another checkpoint (sha256 {about.sha256[:12]}…)",
            "give the checkpoint that qat wrote beside them",
        )
    layers = {}
    for name in [key.removesuffix("/weight") for key in file.keys if key.endswith("/weight")]:
        weight = _positive(file, f"{name}/weight", (None,)).float()
        layers[name] = LayerScales(weight, float(_positive(file, f"{name}/input", ())))
    pool = float(_positive(file, f"{POOL}/input", ())) if f"{POOL}/input" in file.keys else None
    return QatScales(layers, pool, about.full_range), ScalesOrigin(
        about.recipe, about.steps, about.seed, about.trained_as
    )


def _positive(file: ArrayFile, key: str, shape: tuple[int | None, ...]) -> Tensor:
    values = file.numbers(key, shape)
    if not bool((values > 0).all()):
        raise DeployError(f"{file.name}: {key} has scales that are not positive", file.hint)
    return values
