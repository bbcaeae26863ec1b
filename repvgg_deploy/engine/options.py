"""The options of an engine build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from repvgg_deploy.errors import DeployError

if TYPE_CHECKING:
    from repvgg_deploy.engine.backends import Backend

HardwareCompatibility = Literal["none", "ampere+", "same-compute-capability"]


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built; the precision is not among it: the ONNX graph carries it.

    Attributes:
        batch_range: smallest, best and largest batch of a graph with a dynamic batch.
        workspace_bytes: the most GPU memory that a layer may use for itself; None for the library's default (all).
        optimization_level: 0 (quick build) to 5 (long search); None for the library's default, 3.
        timing_cache: keep the measured times of kernels between builds.
        hardware_compatibility: for which GPUs besides the builder's own.
        compute_capabilities: of the GPUs that a TensorRT-RTX plan is for, such as `7.5`; empty for its default, all
            that it supports from 8.0 on.
        version_compatible: the plan also runs on later releases of the same major version.
        refittable: new weights can be put into the engine later.
        strip_weights: the plan contains no weights, and cannot run before `refit`; implies refittable.
        tf32: FP32 convolutions may use TF32 tensor cores (10 bits of mantissa), as is the library's default.
    """

    batch_range: tuple[int, int, int] = (1, 32, 256)
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: bool = True
    hardware_compatibility: HardwareCompatibility = "none"
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    refittable: bool = False
    strip_weights: bool = False
    tf32: bool = True

    @property
    def needs_refit(self) -> bool:
        """Whether the engine must take new weights."""
        return self.refittable or self.strip_weights

    def check(self, backend: Backend) -> None:
        """Raise DeployError if an option is out of range or not supported by `backend`.

        Raises:
            DeployError: the first such option.
        """
        smallest, best, largest = self.batch_range
        if not 1 <= smallest <= best <= largest:
            raise DeployError(
                f"the batch range {smallest} {best} {largest} is not in order", "--batch-range MIN OPT MAX, from 1"
            )
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise DeployError(f"there is no optimization level {self.optimization_level}", "from 0 to 5")
        if self.workspace_bytes is not None and self.workspace_bytes < 0:
            raise DeployError("the workspace cannot be negative", "give a size in bytes")
        capabilities = backend.capabilities
        if self.hardware_compatibility != "none" and not capabilities.hardware_compatible:
            raise DeployError(
                f"{backend.label} has no hardware compatibility levels: its plans run on every GPU that it supports",
                "leave --hardware-compatibility out",
            )
        known = capabilities.compute_capabilities
        unknown = [target for target in self.compute_capabilities if known is None or target not in known]
        if unknown:
            raise DeployError(
                f"{backend.label} cannot be told to build for compute capability {unknown[0]}",
                f"one of: {', '.join(known)}" if known else "it builds for the GPU of this machine",
            )
        if self.version_compatible and not capabilities.version_compatible:
            raise DeployError(
                f"{backend.label} builds no version-compatible plans: its package has no lean runtime",
                "leave --version-compatible out",
            )
