"""`load_checkpoint`: the tensors of a RepVGG under canonical names, and the architecture that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from repvgg_deploy.checkpoints.architecture import infer_spec
from repvgg_deploy.checkpoints.assembly import assemble, require_arrays
from repvgg_deploy.checkpoints.choice import choose_net
from repvgg_deploy.checkpoints.containers import read_contents
from repvgg_deploy.checkpoints.module_settings import read_modules
from repvgg_deploy.checkpoints.settings import read_settings
from repvgg_deploy.checkpoints.sources import open_source
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable
from repvgg_deploy.hardware.threads import start_workers
from repvgg_deploy.nets.cards import describe, find_card, match_card
from repvgg_deploy.nets.settings import (
    NO_SETTINGS,
    Origins,
    Settings,
    StructureOptions,
    fit_settings,
    structure_origins,
)
from repvgg_deploy.nets.spec import ArchSpec

if TYPE_CHECKING:
    from torch import Tensor

    from repvgg_deploy.nets.repvgg import RepVGG


@dataclass(frozen=True)
class Checkpoint:
    """A RepVGG read from a file: canonical names to tensors, and what they are.

    A net without a classifier has 0 classes. Nothing here was executed, and nothing runs when it is read.

    Torch is imported when `tensors` are first asked for.

    Attributes:
        arrays: the numbers of the tensors by canonical name, in memory, float32 or float64.
        prefix: which net of the file it is: the keys of dicts and the words of names before its own, by dots.
        notes: things that a user should know of the file.
        configuration: what the file says beside its tensors, as plain data: dicts with string keys, lists, tuples,
            text, numbers, bytes, None, and an `Inert` record instead of each object. So an mmengine file has its
            configuration's text at `configuration["meta"]["cfg"]`, the official trainer's has a record of a yacs
            `CfgNode` at `configuration["config"]`, Lightning's its `hyper_parameters`; `attributes_of` reads dicts
            and records alike. Of a safetensors file it is the metadata, a string each.
        settings: what the configuration, or a pickle of whole modules, says of the net and its images.
        origins: what decided the parts of `spec` that leave no tensor.

    Example:
        >>> from repvgg_deploy import load_checkpoint
        >>> checkpoint = load_checkpoint("net.pth")
        >>> checkpoint.spec.classes
        12
    """

    path: Path
    sha256: str
    layout: str
    spec: ArchSpec
    arrays: Mapping[str, NDArray[Any]]
    is_ema: bool
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]
    prefix: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    settings: Settings = NO_SETTINGS
    origins: Origins = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by canonical name, on the CPU; they lie in the memory of `arrays`."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}

    @property
    def arch(self) -> str:
        """The card's name, or a description of a custom architecture."""
        return describe(self.spec)

    @property
    def form(self) -> str:
        """`train` or `deploy`."""
        return self.spec.form

    def backbone(self, maps: tuple[int, ...] = ()) -> Checkpoint:
        """The checkpoint without its classifier and what no output needs; see `ArchSpec.backbone`."""
        spec = self.spec.backbone(maps)
        kept = tuple(f"stages.{number}." for number in range(len(spec.stages)))
        return replace(self, spec=spec, arrays={k: v for k, v in self.arrays.items() if k.startswith(kept)})

    def without_tensors(self) -> Checkpoint:
        """All that is known of the file, but not its weights: they need not stay in memory for it."""
        return replace(self, arrays={})


@dataclass(frozen=True)
class CheckpointOptions:
    """What a user says of a checkpoint; see `load_checkpoint`."""

    arch: str | None = None
    ema: bool | None = None
    structure: StructureOptions = field(default_factory=StructureOptions)
    net: str | None = None

    def load(self, path: Path) -> Checkpoint:
        """The checkpoint at `path`, read with these options."""
        return load_checkpoint(path, self.arch, self.ema, self.structure, self.net)


def load_checkpoint(
    path: str | Path,
    arch: str | None = None,
    ema: bool | None = None,
    structure: StructureOptions | None = None,
    net: str | None = None,
) -> Checkpoint:
    """The RepVGG in a checkpoint file of any supported library, in training or deploy form.

    Args:
        path: a `.pth`, `.pt`, `.pth.tar`, `.ckpt`, `.npz` or `.safetensors` file; told by its content.
        arch: the architecture that the caller expects; anything else in the file is an error.
        ema: take the EMA copy (True), the plain weights (False), or the plain ones where there are some (None).
        structure: what no tensor tells; it goes before what the configuration says.
        net: of several nets in the file, the one whose names begin with this.

    Raises:
        CheckpointError: the file is damaged, unsafe, holds another network or several, lacks tensors or has surplus
            ones, shapes contradict each other, values are not finite, a variance is negative, or `arch` does not match.

    Example:
        >>> from repvgg_deploy import load_checkpoint
        >>> checkpoint = load_checkpoint("net.pth")
        >>> checkpoint.arch, checkpoint.layout, checkpoint.form
        ('RepVGG-demo', 'official', 'train')
    """
    path = Path(path)
    structure = structure or StructureOptions()
    wanted = find_card(arch) if arch is not None else None
    with open_source(path) as source, start_workers(1) as pool:
        contents = read_contents(source, path)
        # Hashing releases the interpreter lock, so it costs no time of its own beside the reading.
        sha256 = pool.submit(source.hash)
        chosen = choose_net(contents, path, ema, net)
        require_arrays(chosen.net.keys, chosen.tensors)
        spec = infer_spec(chosen.net.keys, chosen.tensors)
        holds = describe(spec)
        if wanted is not None and not holds.startswith(wanted.name + " ") and holds != wanted.name:
            raise CheckpointError(
                f"{printable(str(path))} contains {holds}, not {wanted.name}",
                "leave --arch out, or give the checkpoint that you meant",
            )
        assembled = assemble(spec, chosen, source.size, structure.head_activation)
        names = contents.class_names
        checkpoint = Checkpoint(
            path,
            sha256.result(),
            chosen.net.keys.layout.name,
            assembled.spec,
            assembled.arrays,
            chosen.is_ema,
            names if names is not None and len(names) == assembled.spec.classes else None,
            (*chosen.notes, *assembled.notes, *contents.notes),
            chosen.net.prefix,
            contents.configuration,
        )
        modules = read_modules(contents.modules, chosen.net)
    return _settle(checkpoint, structure, modules)


def _settle(checkpoint: Checkpoint, structure: StructureOptions, modules: StructureOptions) -> Checkpoint:
    """The checkpoint with what its user, or else its configuration, says of the parts that leave no tensor."""
    spec, names = checkpoint.spec, checkpoint.class_names
    card = match_card(spec)
    name = None if card is None else card.name
    settings = read_settings(checkpoint.path, checkpoint.configuration, name, modules)
    settings = fit_settings(settings, spec)
    if names is None and settings.class_names is not None and len(settings.class_names) == spec.classes:
        names = settings.class_names
    return replace(
        checkpoint,
        spec=structure.over(settings.structure).apply(spec),
        class_names=names,
        notes=(*checkpoint.notes, *settings.notes),
        settings=settings,
        origins=structure_origins(structure, settings),
    )


def build(checkpoint: Checkpoint) -> RepVGG:
    """The net that a checkpoint holds, in evaluation mode, in the form that the file has.

    The net shares the checkpoint's tensors: nothing is copied, except where half precision becomes float32.

    Example:
        >>> from repvgg_deploy import build, load_checkpoint
        >>> net = build(load_checkpoint("net.pth"))
        >>> net(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 12])
    """
    import torch

    from repvgg_deploy.nets.repvgg import RepVGG

    with torch.device("meta"):
        net = RepVGG(checkpoint.spec)
    tensors = dict(checkpoint.tensors)
    # They matter to training alone, so they are not read; `load_state_dict` wants them.
    counters = {name: torch.tensor(0) for name in net.state_dict() if name.endswith("num_batches_tracked")}
    net.load_state_dict(counters | tensors, assign=True)
    return net.requires_grad_(False).eval()
