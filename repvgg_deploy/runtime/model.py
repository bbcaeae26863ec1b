"""`open_model`: a checkpoint, an ONNX graph or an engine as something that takes pixels and gives scores."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repvgg_deploy.artifacts import Array, Preprocessing, PreprocessingOptions, Provenance
from repvgg_deploy.checkpoints import CheckpointOptions, build
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.files.kinds import file_kind
from repvgg_deploy.files.publishing import finish_interrupted
from repvgg_deploy.graphs.metadata import read_metadata
from repvgg_deploy.hardware.cpu import require_memory
from repvgg_deploy.images.decoding import Pixels, normalize, take_luma
from repvgg_deploy.nets.cards import require_arch
from repvgg_deploy.nets.preprocessing import choose_preprocessing, require_channels
from repvgg_deploy.nets.settings import StructureOptions, recorded_structure
from repvgg_deploy.runtime.base import Runner
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.runtime.torch import TorchRunner

_BATCH_BYTES = 1 << 30
# A graph may declare any batch; beyond so many bytes of zeros it is refused instead of run on them.
_MOST_PADDING = 4 << 30


@dataclass(frozen=True)
class Model:
    """A classifier, or a backbone, that can be run on pixels.

    Attributes:
        classes: how many there are; None if the model does not say, 0 for a backbone.
        channels: of the input; None if the model does not say.
        takes_pixels: the model takes uint8 NHWC and normalizes itself.
        half_input: its input is float16.
        notes: what a user should know of how it is run here.
        structure: what a graph or an engine records of the net that it was made from.

    Example:
        >>> from repvgg_deploy import open_model
        >>> model = open_model(Path("net.pth"))
        >>> model.classes
        12
    """

    path: Path
    runner: Runner
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    classes: int | None = None
    channels: int | None = None
    takes_pixels: bool = False
    half_input: bool = False
    notes: tuple[str, ...] = ()
    structure: StructureOptions = field(default_factory=StructureOptions)

    def require_classes(self) -> None:
        """Raise DeployError if the model gives features and no classes."""
        if self.classes == 0:
            raise DeployError(f"{self.path} gives features, not classes", "take a model that has its classifier")

    def images_per_run(self, wanted: int) -> int:
        """The model's own batch, or `wanted` images, or as many of them as take a gigabyte; at least one."""
        if self.runner.batch is not None:
            return self.runner.batch
        bytes_per_image = 4 * len(self.preprocessing.mean) * self.preprocessing.height * self.preprocessing.width
        return max(1, min(wanted, _BATCH_BYTES // bytes_per_image))

    def run_pixels(self, pixels: Pixels) -> dict[str, Array]:
        """The outputs for cropped pixels (n, H, W, channels); of RGB pixels a net of one channel gets the luma.

        Raises:
            DeployError: the net takes another number of channels.
        """
        if self.channels == 1:
            pixels = take_luma(pixels)
        if self.channels is not None and pixels.shape[-1] != self.channels:
            raise DeployError(
                f"{self.path} takes {self.channels} channels, images have {pixels.shape[-1]}",
                "leave the image folder out; such a net can be run on arrays only",
            )
        images: Array = pixels if self.takes_pixels else normalize(pixels, self.preprocessing)
        return self.run_images(images)

    def run_images(self, images: Array) -> dict[str, Array]:
        """The outputs for inputs as the model takes them, in any number."""
        if not self.takes_pixels:
            images = images.astype(np.float16 if self.half_input else np.float32, copy=False)
        size = self.runner.batch
        if size is None or size == len(images):
            return self.runner.run(images)
        parts = []
        what = f"the batch of {size} that {self.path} takes"
        require_memory(size * images[:1].nbytes, what)
        if (size - len(images)) * images[:1].nbytes > _MOST_PADDING:
            raise DeployError(f"{what} would be zeros but for {len(images)} images", "export it with a smaller batch")
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            try:
                padded = np.concatenate([chunk, np.zeros((size - len(chunk), *images.shape[1:]), images.dtype)])
            except MemoryError as error:
                raise DeployError(f"there is too little memory for {what}", "export it with a smaller batch") from error
            outputs = self.runner.run(padded)
            parts.append({name: values[: len(chunk)] for name, values in outputs.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def rank_classes(outputs: dict[str, Array], count: int) -> NDArray[np.int64]:
    """The `count` best classes of each image, best first (n, count); fewer where the model gives fewer."""
    if "classes" in outputs:
        return outputs["classes"][:, :count].astype(np.int64)
    scores = next(iter(outputs.values()))
    # Stable: of equal scores the lower class comes first, on every backend.
    return np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :count]


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis, in float64."""
    # The largest is subtracted so that no exponential overflows.
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class _Signature:
    """The input and outputs of a graph or engine; None for a dynamic dimension."""

    shape: tuple[int | None, ...]
    dtype: str
    outputs: dict[str, tuple[int | None, ...]]


def open_model(
    path: Path,
    preprocessing: PreprocessingOptions | None = None,
    checkpoint: CheckpointOptions | None = None,
    trust: bool = False,
    exact_integers: bool = True,
    threads: int = 0,
) -> Model:
    """The model in a checkpoint (run in torch), an ONNX graph (in ONNX Runtime), or an engine (on the GPU).

    `preprocessing` goes before what the model's metadata, configuration or card say of it.
    `checkpoint` says how a checkpoint is read; of a graph or an engine its `arch` is the one expected.
    `exact_integers`: an INT8 graph whose sums may saturate on this CPU is run with slower kernels that add exactly, so
    that its outputs are those of every other machine; a note says so.
    `threads` run a graph on the CPU; by default one per core.

    Raises:
        DeployError: there is no such file, it is none of these, it cannot be run here, or the options contradict it.

    Example:
        >>> from repvgg_deploy import open_model
        >>> model = open_model(Path("net.pth"))
        >>> model.run_images(np.zeros((2, 3, 64, 64), np.float32))["logits"].shape
        (2, 12)
    """
    finish_interrupted(path.parent)
    options, said = preprocessing or PreprocessingOptions(), checkpoint or CheckpointOptions()
    if replace(said, arch=None) != CheckpointOptions() and path.is_file() and (file_kind(path) != "checkpoint"):
        raise DeployError(
            f"{path} is an exported file", "--ema, --no-ema, --net, --strides, --act and --bn-eps are for checkpoints"
        )
    if path.is_file() and file_kind(path) == "engine":
        return _open_engine(path, options, said.arch, trust)
    if path.is_file() and file_kind(path) == "onnx":
        runner = OnnxRunner(path, threads=threads, exact_integers=exact_integers)
        dtype = runner.input_type.removeprefix("tensor(").removesuffix(")")
        outputs = dict(zip(runner.output_names, runner.output_shapes, strict=True))
        signature = _Signature(runner.input_shape, dtype, outputs)
        provenance = read_metadata(runner.metadata)
        require_arch(path, provenance, said.arch)
        model = _describe(path, runner, signature, provenance, options)
        return replace(model, notes=_saturation_notes(path, runner))
    found = said.load(path)
    return Model(
        path,
        TorchRunner(build(found)),
        choose_preprocessing(found.spec, options, found.settings),
        found.class_names,
        found.spec.classes,
        found.spec.in_channels,
    )


def _saturation_notes(path: Path, runner: OnnxRunner) -> tuple[str, ...]:
    if not runner.saturating:
        return ()
    first, *others = runner.saturating
    layers = f"layer {first} of {path}" if not others else f"{len(others) + 1} layers of {path} ({first}, …)"
    how = "run with exact sums, which is slower" if runner.exact_integers else "outputs differ from those elsewhere"
    return (f"sums in {layers} may saturate on this CPU, which has no VNNI: {how}",)


def _open_engine(path: Path, options: PreprocessingOptions, arch: str | None, trust: bool) -> Model:
    from repvgg_deploy.engine.cleanup import release_at_close
    from repvgg_deploy.engine.runner import open_engine

    engine = open_engine(path, trust)
    with ExitStack() as cleanup:
        release_at_close(cleanup, engine.close)
        outputs = {tensor.name: _dynamic(tensor.shape) for tensor in engine.outputs}
        signature = _Signature(_dynamic(engine.input.shape), engine.input.dtype, outputs)
        require_arch(path, engine.provenance, arch)
        model = _describe(path, engine, signature, engine.provenance, options)
        cleanup.pop_all()
    return replace(model, notes=tuple(f"{engine.backend} warns: {warning}" for warning in engine.warnings))


def _dynamic(shape: tuple[int, ...]) -> tuple[int | None, ...]:
    return tuple(size if size >= 0 else None for size in shape)


def _describe(
    path: Path, runner: Runner, signature: _Signature, provenance: Provenance | None, options: PreprocessingOptions
) -> Model:
    """A graph or an engine as a model; its shapes and its provenance say how pixels become its input."""
    takes_pixels = signature.dtype == "uint8"
    height, width = signature.shape[1:3] if takes_pixels else signature.shape[2:4]
    channels = signature.shape[3] if takes_pixels else signature.shape[1]
    base = provenance.preprocessing if provenance is not None else None
    preprocessing = options.apply(base or _from_shape(height, width))
    if (height, width) != (None, None) and (height, width) != (preprocessing.height, preprocessing.width):
        raise DeployError(
            f"{path} takes {height}x{width} pixels, not {preprocessing.height}x{preprocessing.width}",
            "leave --size out, or export for that size",
        )
    require_channels(preprocessing, channels)
    classes = _classes(signature, provenance)
    if classes != 0 and any(len(shape) != 2 for shape in signature.outputs.values()):
        raise GraphError(f"{path} does not give one score per class", "an image classifier has one output N,classes")
    return Model(
        path,
        runner,
        preprocessing,
        provenance.class_names if provenance is not None else None,
        classes,
        channels,
        takes_pixels,
        half_input=signature.dtype == "float16",
        structure=recorded_structure(provenance.extra.get("assumed") if provenance is not None else None),
    )


def _classes(signature: _Signature, provenance: Provenance | None) -> int | None:
    """How many classes there are; a top-k graph says so in its metadata, and a backbone that it has none."""
    if provenance is not None and "outputs" in provenance.extra:
        return 0
    if "classes" not in signature.outputs:
        # A scalar has no classes.
        return next((shape[-1] if shape else None for shape in signature.outputs.values()), None)
    known = provenance.extra.get("classes") if provenance is not None else None
    return known if isinstance(known, int) else None


def _from_shape(height: int | None, width: int | None) -> Preprocessing:
    """For a graph of unknown origin: the preprocessing of ImageNet at the graph's size."""
    if height is None or width is None or (height, width) == (224, 224):
        return Preprocessing()
    return Preprocessing(height, width, max(height, width))
