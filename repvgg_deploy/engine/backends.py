"""The TensorRT libraries behind one `Backend`: which of them is installed, and what only one of them has.

`tensorrt` 10.13 to 11 and `tensorrt_rtx` have nearly the same Python module, so the module is a value here. What they
do not share is named in `Capabilities`; nothing else in this package asks which library it talks to.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.gpus import Gpu, find_gpus

BackendName = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[BackendName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LABELS: dict[BackendName, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
# INT8 graphs have uint8 zero-points after a ReLU. The ONNX parser refused them up to 10.1, and from 10.10 on it reads
# those that are 0 as int8 in strongly typed networks: 10.13 is safely above that.
OLDEST: dict[BackendName, tuple[int, int]] = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 7)}

# Attributes that not every supported release has; use them only through `has`.
OPTIONAL = frozenset(
    {
        "BuilderFlag.REQUIRE_USER_ALLOCATION",
        "ComputeCapability",
        "DynamicShapesKernelSpecializationStrategy",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "IExecutionContext.is_stream_capturable",
        "IRuntimeCache",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_runtime_cache",
        "SerializationFlag.INCLUDE_REFIT",
    }
)


@dataclass(frozen=True)
class Capabilities:
    """What one library can do and another cannot.

    Attributes:
        builds_without_gpu: an engine can be built on a machine without a GPU.
        hardware_compatible: a plan can be built for other GPU architectures than the builder's.
        version_compatible: a plan can be built for other releases of the library.
        portable: a plan runs on every GPU that the library supports, wherever it was built.
        compute_capabilities: of the GPUs that the library supports, such as `8.9`; None if the list is open.
    """

    builds_without_gpu: bool
    hardware_compatible: bool
    version_compatible: bool
    portable: bool
    compute_capabilities: tuple[str, ...] | None


@dataclass(frozen=True)
class Backend:
    """An installed TensorRT library; `module` is the imported Python module."""

    name: BackendName
    version: str
    module: Any
    capabilities: Capabilities

    @property
    def label(self) -> str:
        """Name and version as a message says them: `TensorRT-RTX 1.7.1.116`."""
        return f"{LABELS[self.name]} {self.version}"

    def supports(self, gpu: Gpu) -> bool:
        """Whether the library's own list of GPUs names this one; True where it has no such list."""
        known = self.capabilities.compute_capabilities
        return known is None or gpu.compute_capability in known


@dataclass(frozen=True)
class Unavailable:
    """Why there is no backend, and what would change that."""

    reason: str
    hint: str


def has(module: Any, path: str) -> bool:
    """Whether the library has `Class` or `Class.attribute`, one of `OPTIONAL`."""
    if path not in OPTIONAL:
        raise ValueError(f"{path} is not listed as optional")
    value = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value is not None


@cache
def import_backend(name: BackendName) -> Backend | Unavailable:
    """The library called `name`, or why it cannot be imported; nothing is said of GPUs."""
    try:
        # The libraries' own start-up warnings are not the user's.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        return Unavailable(f"{LABELS[name]} is not installed (no module {error.name})", _install_hint(name))
    except (ImportError, OSError, RuntimeError) as error:
        # The bindings are there, the libraries are not: the loader's message names the missing file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Unavailable(f"{LABELS[name]} is installed but does not load: {reason}", _install_hint(name))
    version = str(getattr(module, "__version__", "0"))
    if release(version) < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        return Unavailable(f"{LABELS[name]} {version} is too old; {oldest} is needed", _install_hint(name))
    return Backend(name, version, module, _capabilities(name, module))


def find_backend(name: str) -> Backend | Unavailable:
    """The backend that builds here: the one that was named, or with `auto` TensorRT, else TensorRT-RTX.

    Raises:
        DeployError: a backend was named and cannot build here, or there is none of that name.
    """
    if name == "none":
        return Unavailable("no engine was requested", "")
    if name == "auto":
        return _first_usable()
    if name not in MODULES:
        raise DeployError(f"no engine backend is called {name!r}", "one of: auto, tensorrt, tensorrt-rtx, none")
    found = import_backend(name)
    if isinstance(found, Backend):
        found = _if_it_builds_here(found, named=True)
    if isinstance(found, Unavailable):
        raise DeployError(found.reason, found.hint)
    return found


def _first_usable() -> Backend | Unavailable:
    reasons: list[Unavailable] = []
    for name in MODULES:
        found = import_backend(name)
        if isinstance(found, Backend):
            found = _if_it_builds_here(found, named=False)
        if isinstance(found, Backend):
            return found
        reasons.append(found)
    return Unavailable("; ".join(r.reason for r in reasons), reasons[-1].hint)


def _if_it_builds_here(backend: Backend, named: bool) -> Backend | Unavailable:
    """`backend`, or why it cannot build here; a GPU that it does not list is tried only if the backend was named."""
    found = find_gpus()
    if not found.gpus and not backend.capabilities.builds_without_gpu:
        return Unavailable(
            f"{backend.label} builds engines on a GPU only, and there is none here ({found.reason})",
            "build on the machine that will run the engine, or use TensorRT-RTX: --engine tensorrt-rtx",
        )
    if found.gpus and not named and not backend.supports(found.gpus[0]):
        return Unavailable(unsupported_gpu(backend, found.gpus[0]), _install_hint("tensorrt"))
    return backend


def unsupported_gpu(backend: Backend, gpu: Gpu) -> str:
    """The message for a GPU that is not on the library's list."""
    known = ", ".join(backend.capabilities.compute_capabilities or ())
    return (
        f"{backend.label} does not support the {gpu.name} (compute capability {gpu.compute_capability}); "
        f"it supports {known}"
    )


def release(version: str) -> tuple[int, int]:
    """Major and minor number of `10.16.1.11`."""
    parts = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    return (parts[0], parts[1]) if len(parts) == 2 else (0, 0)


def _capabilities(name: BackendName, module: Any) -> Capabilities:
    rtx = name == "tensorrt-rtx"
    known: tuple[str, ...] | None = None
    if has(module, "ComputeCapability"):
        names = [str(item) for item in module.ComputeCapability.__members__ if str(item).startswith("SM")]
        # SM120 is 12.0: the last digit is the minor number.
        known = tuple(f"{number // 10}.{number % 10}" for number in sorted(int(item[2:]) for item in names))
    return Capabilities(
        builds_without_gpu=rtx,
        # TensorRT-RTX ignores the hardware level with a warning; its wheel has no lean runtime, which a
        # version-compatible plan carries.
        hardware_compatible=not rtx,
        version_compatible=not rtx,
        portable=rtx,
        compute_capabilities=known,
    )


def _install_hint(name: BackendName) -> str:
    if name == "tensorrt":
        return "pip install tensorrt cuda-python (needs NVIDIA's package host), or use NVIDIA's container"
    return "pip install tensorrt-rtx, and cuda-python to run what it builds"
