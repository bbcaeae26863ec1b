"""From a plan on disk to a deserialized engine: what the sidecar says is checked first."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repvgg_deploy.engine.backends import MODULES, Backend, BackendName, Unavailable, import_backend
from repvgg_deploy.engine.cleanup import release_at_close
from repvgg_deploy.engine.context_settings import ContextSettings
from repvgg_deploy.engine.cuda.interface import Cuda, open_cuda
from repvgg_deploy.engine.log import collect_messages, construct, explain_failure, get_logger
from repvgg_deploy.engine.network import DTYPES, Tensor
from repvgg_deploy.engine.sidecar import (
    Sidecar,
    read_plan,
    read_sidecar,
    require_same_gpu,
    require_same_library,
    require_unchanged,
    sidecar_path,
)
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.publishing import finish_interrupted
from repvgg_deploy.hardware.gpus import find_gpus
from repvgg_deploy.hardware.threads import run_cancellable


@dataclass
class LoadedEngine:
    """A deserialized engine and what it needs to live.

    Attributes:
        side: what the sidecar says; None for a trusted plan without one.
        inputs, outputs: its tensors; -1 for a dynamic batch.
        profile: smallest, best and largest batch.
        sha256: of the plan.
        warnings: the library's, at loading.
        settings: what the contexts are created from; made with the first of them.
    """

    plan: Path
    backend: Backend
    cuda: Cuda
    runtime: Any
    engine: Any
    side: Sidecar | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profile: tuple[int, int, int]
    sha256: str = ""
    warnings: tuple[str, ...] = ()
    settings: ContextSettings | None = None

    def close(self) -> None:
        """Release the engine's memory, even if this object is still referenced; its contexts must be gone before."""
        if self.settings is not None:
            # It outlives the contexts, and goes before the engine that it was made by.
            self.settings.close()
            self.settings = None
        self.engine = None
        self.runtime = None
        self.cuda.close()


def check_plan(plan: Path, trust: bool = False) -> tuple[bytes, Sidecar | None]:
    """The bytes of `plan` and its sidecar, after the bytes were found to be those that were built.

    With `trust` neither a missing sidecar nor another hash is an error.

    Raises:
        DeployError: there is no such plan or no sidecar, or the plan is not what the sidecar was written for.
    """
    # A run that was killed between its renames may have left its plan beside an older sidecar.
    finish_interrupted(plan.parent)
    content = read_plan(plan)
    if trust:
        return content, read_sidecar(plan) if sidecar_path(plan).is_file() else None
    side = read_sidecar(plan)
    require_unchanged(plan, content, side)
    return content, side


def load_plan(
    plan: Path, trust: bool = False, backend: str | None = None, cuda: str | None = None, for_refit: bool = False
) -> LoadedEngine:
    """Deserialize `plan` on the first GPU of this machine, once all that can be checked before was checked.

    `backend` names the library of a trusted plan that has no sidecar. A plan can hold code: one whose sha256 is not
    that of its sidecar is never given to the library, unless `trust` says so.

    Raises:
        DeployError: the plan is not what was built, it is for another library, version or GPU, or none is here.
    """
    content, side = check_plan(plan, trust)
    if side is not None and not side.has_weights and not for_refit:
        raise DeployError(f"{plan} was built without weights", f"add them: repvgg-deploy refit {plan} CHECKPOINT")
    library = _choose_library(plan, side, backend)
    if side is not None:
        require_same_library(plan, side, library)
    opened = open_cuda(cuda)
    with ExitStack() as cleanup:
        release_at_close(cleanup, opened.close)
        found = find_gpus()
        if side is not None and found.gpus:
            require_same_gpu(plan, side, found.gpus[0], library)
        runtime, engine, warnings = _deserialize(library, plan, content, side)
        inputs, outputs = _read_tensors(library, engine)
        profile = _read_profile(plan, engine, inputs)
        cleanup.pop_all()
    sha256 = side.sha256 if side is not None else hashlib.sha256(content).hexdigest()
    return LoadedEngine(
        plan, library, opened, runtime, engine, side, inputs, outputs, profile, sha256=sha256, warnings=warnings
    )


def _choose_library(plan: Path, side: Sidecar | None, name: str | None) -> Backend:
    if name is not None and name not in MODULES:
        raise DeployError(f"no engine backend is called {name!r}", f"one of: {', '.join(MODULES)}")
    # Without a sidecar or a name the first library that is installed is taken: a plan does not say which one built it.
    names: list[BackendName] = [known for known in MODULES if name in (None, known)]
    if side is not None:
        names = [side.backend]
    reasons: list[Unavailable] = []
    for candidate in names:
        found = import_backend(candidate)
        if isinstance(found, Backend):
            return found
        reasons.append(found)
    built = f" ({plan} was built by {side.label})" if side is not None else ""
    raise DeployError("; ".join(reason.reason for reason in reasons) + built, reasons[0].hint)


def _deserialize(
    backend: Backend, plan: Path, content: bytes, side: Sidecar | None
) -> tuple[Any, Any, tuple[str, ...]]:
    """The library's runtime, the engine, and what the library warns of."""
    trt = backend.module
    with collect_messages(backend) as messages:
        runtime = construct(backend, f"loading {plan}", messages, lambda: trt.Runtime(get_logger(backend)))
        if side is not None and side.options.version_compatible:
            # Such a plan carries the runtime of its own version, which is code for the host.
            runtime.engine_host_code_allowed = True
        engine = run_cancellable(lambda: runtime.deserialize_cuda_engine(content))
        if engine is None:
            raise explain_failure(backend, f"loading {plan}", messages)
        return runtime, engine, tuple(dict.fromkeys(messages.warnings))


def _read_tensors(backend: Backend, engine: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    modes = backend.module.TensorIOMode
    tensors: dict[Any, list[Tensor]] = {modes.INPUT: [], modes.OUTPUT: []}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name).name
        if dtype not in DTYPES:
            raise DeployError(
                f"the tensor {name} is of type {dtype}, which NumPy does not support", "export with --io fp32"
            )
        tensor = Tensor(name, DTYPES[dtype], tuple(engine.get_tensor_shape(name)))
        tensors[engine.get_tensor_mode(name)].append(tensor)
    return tuple(tensors[modes.INPUT]), tuple(tensors[modes.OUTPUT])


def _read_profile(plan: Path, engine: Any, inputs: tuple[Tensor, ...]) -> tuple[int, int, int]:
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise DeployError(f"{plan} does not take one batch of images", "an image classifier has one input N,C,H,W")
    if any(size < 0 for size in inputs[0].shape[1:]):
        raise DeployError(f"{plan}: its input {inputs[0].shape} is dynamic beyond the batch", "export with --size")
    fixed = inputs[0].shape[0]
    if fixed >= 0:
        return fixed, fixed, fixed
    smallest, best, largest = (int(shape[0]) for shape in engine.get_tensor_profile_shape(inputs[0].name, 0))
    return smallest, best, largest
