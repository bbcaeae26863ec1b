"""`engine.plan.json`: what a plan is, where it may run, and the hash without which it is not deserialized."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from repvgg_deploy.artifacts import Precision, Provenance
from repvgg_deploy.engine.backends import LABELS, Backend, BackendName
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.engine.options import BuildOptions
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.typed_values import convert, parse_json, read_file
from repvgg_deploy.hardware.gpus import Gpu

SCHEMA = 1
# Class names of the largest data sets take one megabyte.
_MOST_BYTES = 64 << 20
_REBUILD = "build it again on this machine: `repvgg-deploy export`"
_TRUST = "build it again; `eval --trust` and `verify --trust` run a plan whose origin you trust"


@dataclass(frozen=True)
class Sidecar:
    """What stands beside a plan.

    Attributes:
        sha256, bytes: of the plan.
        gpu: that it was built on; None for a build without one.
        driver: the NVIDIA driver's version at the build, where known.
        profile: smallest, best and largest batch.
        inputs, outputs: the tensors; -1 for a dynamic batch.
        convolutions: how many there are in each precision, as read from the parsed network.
        onnx_sha256: of the graph that the plan was built from.
        provenance: of that graph; None for a graph that this tool did not make.
        seconds: spent in the parser, in the builder, in writing the plan, and in all.
        warnings: the library's, at the build.
        has_weights: False for a weight-stripped plan that was not refitted yet.
    """

    sha256: str
    bytes: int
    backend: BackendName
    backend_version: str
    gpu: Gpu | None
    driver: str
    profile: tuple[int, int, int]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    options: BuildOptions
    convolutions: dict[str, int]
    onnx_sha256: str
    provenance: Provenance | None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    has_weights: bool = True

    @property
    def label(self) -> str:
        """The library and version that built the plan."""
        return f"{LABELS[self.backend]} {self.backend_version}"

    @property
    def precision(self) -> str:
        """fp32, tf32 (fp32 with leave to use TF32 tensor cores), fp16, int8, or `unknown`."""
        if self.provenance is None:
            return "unknown"
        if self.provenance.precision is Precision.FP32 and self.options.tf32:
            return "tf32"
        return str(self.provenance.precision)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


def sidecar_path(plan: Path) -> Path:
    """The file beside a plan: `engine.plan.json` of `engine.plan`."""
    return plan.with_name(plan.name + ".json")


def read_sidecar(plan: Path) -> Sidecar:
    """What stands beside `plan`.

    Raises:
        DeployError: there is no sidecar, it is damaged, or a newer release wrote it.
    """
    path = sidecar_path(plan)
    name = f"the sidecar {path}"
    try:
        content = read_file(path, name, _REBUILD, _MOST_BYTES)
    except FileNotFoundError as error:
        raise DeployError(f"{plan} has no sidecar {path.name} that says what it is", _TRUST) from error
    values = parse_json(content, name, _REBUILD)
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise DeployError(f"{name} has the schema {schema!r:.40}, but this release reads {SCHEMA}", _REBUILD)
    return convert(values, Sidecar, name, _REBUILD)


def read_plan(plan: Path) -> bytes:
    """The bytes of a plan.

    Raises:
        DeployError: there is no such file, or it cannot be read.
    """
    try:
        return read_file(plan, str(plan), "check the path and its permissions", sys.maxsize - 1)
    except FileNotFoundError as error:
        raise DeployError(f"there is no engine {plan}", "build one: `repvgg-deploy export`") from error


def require_unchanged(plan: Path, content: bytes, side: Sidecar) -> None:
    """Raise DeployError unless `content` is the plan that the sidecar was written for.

    Raises:
        DeployError: the plan is shorter, longer, or differs in a byte.
    """
    if len(content) != side.bytes:
        what = "is cut short" if len(content) < side.bytes else "is longer than it was"
        raise DeployError(f"{plan} {what}: {len(content)} bytes, but it was built with {side.bytes}", _REBUILD)
    if hashlib.sha256(content).hexdigest() != side.sha256:
        raise DeployError(f"{plan} was changed after it was built: its sha256 is not that of its sidecar", _REBUILD)


def require_same_library(plan: Path, side: Sidecar, backend: Backend) -> None:
    """Raise DeployError unless `plan` was built by this library, in this or a compatible version.

    Raises:
        DeployError: the library or its version differs.
    """
    if side.backend != backend.name:
        raise DeployError(f"{plan} was built by {side.label}, not for {LABELS[backend.name]}", _REBUILD)
    if side.backend_version != backend.version and not side.options.version_compatible:
        raise DeployError(
            f"{plan} was built by {side.label}, and {backend.label} is installed; plans are for one version only",
            f"{_REBUILD}, or install that version",
        )


def require_same_gpu(plan: Path, side: Sidecar, gpu: Gpu, backend: Backend) -> None:
    """Raise DeployError unless a plan that was built on `side.gpu` can run on `gpu`.

    Raises:
        DeployError: the plan was built for another GPU architecture.
    """
    if backend.capabilities.portable:
        _require_target(plan, side, gpu)
        return
    if side.gpu is None or side.gpu.compute_capability == gpu.compute_capability:
        return
    major = int(gpu.compute_capability.split(".")[0])
    # TensorRT's level "ampere+": every architecture from 8.0 on.
    if side.options.hardware_compatibility == "ampere+" and major >= 8:
        return
    raise DeployError(
        f"{plan} was built for compute capability {side.gpu.compute_capability} ({side.gpu.name}), "
        f"this GPU has {gpu.compute_capability} ({gpu.name})",
        f"{_REBUILD}, or for several GPUs with --hardware-compatibility ampere+",
    )


def _require_target(plan: Path, side: Sidecar, gpu: Gpu) -> None:
    # NVIDIA's "CPU-Only AOT and TensorRT-RTX Engines": by default 8.0 and later; 7.5 must be asked for.
    targets = side.options.compute_capabilities
    too_old = not targets and float(gpu.compute_capability) < 8
    if too_old or (targets and gpu.compute_capability not in targets):
        raise DeployError(
            f"{plan} was built for compute capability {', '.join(targets) or '8.0 and later'}, "
            f"this GPU has {gpu.compute_capability} ({gpu.name})",
            f"build it for this GPU: --compute-capability {gpu.compute_capability}",
        )
