"""What this machine can do: GPUs, driver, backends with their versions, and what is missing for the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import asdict, dataclass

from repvgg_deploy.engine.backends import LABELS, MODULES, Backend, BackendName, import_backend, unsupported_gpu
from repvgg_deploy.engine.network import create_builder
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.cpu import read_cpu, usable_cores
from repvgg_deploy.hardware.gpus import FoundGpus, find_gpus
from repvgg_deploy.runtime.onnxruntime import import_onnxruntime

# The CUDA provider is listed even where it cannot load; the wheel's own list is all that is said here. TensorRT's is
# left out: weakly typed as it is, it runs neither fp16 nor INT8 graphs in their own types.
_PROVIDERS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}

# What some commands need or are faster with, and the extra that brings it.
_OPTIONAL = {
    "simplejpeg": ("fast decoding of JPEG files", "serve"),
    "pyarrow": ("Parquet files of predictions", "serve"),
    "pooch": ("published checkpoints by name", "pull"),
    "ray": ("predictions on a cluster", "ray"),
}


@dataclass(frozen=True)
class Row:
    """One part of the machine.

    Attributes:
        part: its name, for example `tensorrt-rtx`; what `--require` takes.
        version: where it has one.
        detail: what was found.
        can_build, can_run: engines (or for ONNX Runtime, graphs) here; None if that does not apply.
        missing: the reason, empty if nothing is missing.
        hint: what to do about it.
    """

    part: str
    version: str
    detail: str
    can_build: bool | None = None
    can_run: bool | None = None
    missing: str = ""
    hint: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether the part works here: for an engine backend that it builds, for all others that they run."""
        return self.can_run is not False if self.can_build is None else self.can_build

    def to_dict(self) -> dict[str, str | bool | None]:
        """The fields by name, as the command line's JSON has them."""
        return asdict(self)


def probe_machine() -> list[Row]:
    """What this machine can do, one row per part; every claim was tried, except that no engine is built or run."""
    found = find_gpus()
    cuda = [_probe_module("cuda.bindings", "cuda-bindings", found), _probe_module("pycuda.driver", "pycuda", found)]
    can_run_cuda = any(row.can_run for row in cuda)
    engines = [_probe_backend(name, found, can_run_cuda) for name in MODULES]
    libraries = [_probe_onnxruntime(), _probe_torch(), *map(_probe_optional, _OPTIONAL)]
    return [_probe_host(), *_probe_gpus(found), *engines, *cuda, *libraries]


def require_parts(rows: list[Row], wanted: tuple[str, ...]) -> None:
    """Raise DeployError unless every part that was named is usable here.

    Raises:
        DeployError: a part is not usable or does not exist; the hint says what to install.
    """
    parts = {row.part: row for row in rows}
    for name in wanted:
        if name not in parts:
            raise DeployError(f"there is no part {name!r}", f"one of: {', '.join(parts)}")
        row = parts[name]
        if not row.is_usable:
            raise DeployError(f"{name} cannot be used here: {row.missing}", row.hint)


def _probe_host() -> Row:
    detail = (
        f"{platform.system()} {platform.machine()}, {usable_cores()} CPU cores, {read_cpu().integer_instructions}, "
        f"Python {platform.python_version()}"
    )
    return Row("machine", "", detail)


def _probe_gpus(found: FoundGpus) -> list[Row]:
    version = found.driver or (f"CUDA {found.cuda}" if found.cuda else "")
    if not found.gpus:
        hint = "engines can be built with TensorRT-RTX, and run elsewhere"
        return [Row("gpu", version, "none", can_run=False, missing=found.reason, hint=hint)]
    return [
        Row(
            "gpu" if index == 0 else f"gpu{index}",
            version,
            f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 2**30:.0f} GiB",
            can_run=True,
        )
        for index, gpu in enumerate(found.gpus)
    ]


def _probe_backend(name: BackendName, found: FoundGpus, can_run_cuda: bool) -> Row:
    backend = import_backend(name)
    if not isinstance(backend, Backend):
        return Row(name, "", LABELS[name], False, False, backend.reason, backend.hint)
    can_build, missing, hint = True, "", ""
    try:
        create_builder(backend)
    except DeployError as error:
        can_build, missing, hint = False, error.message, error.hint
    can_run = bool(found.gpus) and can_run_cuda
    if found.gpus and not backend.supports(found.gpus[0]):
        can_run, missing, hint = False, unsupported_gpu(backend, found.gpus[0]), "use TensorRT on this GPU"
    elif not found.gpus:
        missing = missing or f"no GPU to run engines on ({found.reason})"
        hint = hint or "run the engines on a machine with a GPU"
    elif not can_run_cuda:
        missing, hint = missing or "no CUDA library for Python to run engines with", hint or "pip install cuda-python"
    return Row(name, backend.version, LABELS[name], can_build, can_run, missing, hint)


def _probe_module(module: str, package: str, found: FoundGpus) -> Row:
    part = module.removesuffix(".driver")
    hint = "pip install cuda-python" if package == "cuda-bindings" else "pip install pycuda"
    try:
        importlib.import_module(module)
        version = importlib.metadata.version(package)
    except ImportError as error:
        return Row(part, "", "CUDA from Python", can_run=False, missing=str(error).splitlines()[0], hint=hint)
    if not found.gpus:
        return Row(part, version, "CUDA from Python", can_run=False, missing=found.reason, hint="a GPU is needed")
    return Row(part, version, "CUDA from Python", can_run=True)


def _probe_onnxruntime() -> Row:
    try:
        onnxruntime = import_onnxruntime()
    except DeployError as error:
        reason = str(error.__cause__ or error)
        return Row("onnxruntime", "", "ONNX Runtime", can_run=False, missing=reason, hint=error.hint)
    known = [_PROVIDERS[name] for name in onnxruntime.get_available_providers() if name in _PROVIDERS]
    return Row("onnxruntime", onnxruntime.__version__, f"built with: {', '.join(sorted(known))}", can_run=True)


def _probe_torch() -> Row:
    import torch

    return Row("torch", torch.__version__, "CUDA" if torch.cuda.is_available() else "CPU", can_run=True)


def _probe_optional(name: str) -> Row:
    detail, extra = _OPTIONAL[name]
    try:
        importlib.import_module(name)
        return Row(name, importlib.metadata.version(name), detail, can_run=True)
    except ImportError as error:
        missing, hint = str(error).splitlines()[0], f"pip install 'repvgg-deploy[{extra}]'"
        return Row(name, "", detail, can_run=False, missing=missing, hint=hint)
