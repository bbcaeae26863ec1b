"""What a TensorRT library logs, collected; and what its errors mean to a user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from repvgg_deploy.engine.backends import Backend, unsupported_gpu
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.gpus import find_gpus


@dataclass
class Messages:
    """The errors and warnings that a library logged, in order."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all of them."""
        self.errors.clear()
        self.warnings.clear()


@cache
def _logger(module: Any) -> tuple[Any, Messages]:
    """The one logger of a library: it keeps the first that it is given for the life of the process."""
    messages = Messages()
    severe = (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR)
    warning = module.ILogger.WARNING

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in severe:
                messages.errors.append(text)
            elif severity == warning:
                messages.warnings.append(text)

    return Logger(), messages


def get_logger(backend: Backend) -> Any:
    """The library's logger, to be given to its builder, parser and runtime."""
    return _logger(backend.module)[0]


@contextmanager
def collect_messages(backend: Backend) -> Iterator[Messages]:
    """What the library logs inside the block."""
    messages = _logger(backend.module)[1]
    messages.clear()
    yield messages


@dataclass(frozen=True)
class _Meaning:
    said: tuple[str, ...]
    message: str
    hint: str


# The libraries give no error codes to Python, only lines of their log.
_MEANINGS = (
    _Meaning(
        ("out of memory", "OutOfMemory", "cudaError 2:", "Not enough memory", "std::bad_alloc"),
        "the GPU has too little free memory",
        "a smaller --batch-range or workspace; `nvidia-smi` shows who holds the memory",
    ),
    _Meaning(
        ("cudaError 35", "driver version is insufficient"),
        "there is no GPU driver, or it is too old for this library",
        "`repvgg-deploy doctor` shows which driver is installed",
    ),
    _Meaning(
        ("libnvinfer_lean",),
        "this package of the library has no lean runtime, which a version-compatible plan needs",
        "leave version compatibility out, or install the full TensorRT package",
    ),
    _Meaning(
        ("Version tag does not match", "serialized with version", "different version of TensorRT", "older plan file"),
        "the plan was built by another version of the library",
        "export again on this machine",
    ),
    _Meaning(
        ("incompatible with this version of", "Target GPU SM", "generated engine plan file on an incompatible device"),
        "the plan was built for another GPU",
        "export again on this machine",
    ),
    _Meaning(
        ("check_turing_op_compatibility",),
        "the library has no FP32 classifier for compute capability 7.5",
        "--fp16, or --int8 with the rest in FP16",
    ),
    _Meaning(
        ("Could not find any implementation",),
        "the library has no kernel for one of the layers",
        "a larger workspace, or another precision",
    ),
)


_OTHER_LIBRARY = "use TensorRT on this GPU: --engine tensorrt"


def explain_failure(backend: Backend, doing: str, messages: Messages, refittable: bool = False) -> DeployError:
    """The error that says what the library could not do, from what it logged while `doing`."""
    found = find_gpus()
    errors = _causes(messages.errors)
    text = "\n".join(errors)
    unlisted = _unlisted_gpu(backend)
    if unlisted:
        return DeployError(f"{doing} failed: {unlisted}", f"{_OTHER_LIBRARY}; the library said: {first_line(errors)}")
    # What is logged then is an error of CUDA, which says nothing of refitting.
    if refittable and not found.gpus:
        return DeployError(
            f"{doing} failed: {backend.label} builds refittable and weight-stripped engines on a GPU only, "
            f"and there is none here ({found.reason})",
            "leave --refittable and --strip-weights out, or build on a machine with a GPU",
        )
    for meaning in _MEANINGS:
        if any(said in text for said in meaning.said):
            return DeployError(f"{doing} failed: {meaning.message}", f"{meaning.hint}; {first_line(errors)}")
    return DeployError(f"{doing} failed in {backend.label}: {first_line(errors)}", _rest(errors))


def construct(backend: Backend, doing: str, messages: Messages, constructor: Callable[[], Any]) -> Any:
    """The object that a constructor of the library returns; `messages` are those logged around the call.

    Raises:
        DeployError: it returned null, which pybind11 reports as a TypeError: the library could not start CUDA.
    """
    try:
        return constructor()
    except TypeError as error:
        raise explain_failure(backend, doing, messages) from error


@contextmanager
def naming_gpu(backend: Backend) -> Iterator[None]:
    """Inside the block a failure of CUDA names the GPU, where the library does not list it.

    Kernels that were not made for a GPU fail when it runs them, long after the library took the plan.
    """
    try:
        yield
    except DeployError as error:
        unlisted = _unlisted_gpu(backend)
        if not unlisted:
            raise
        raise DeployError(f"{error.message}; {unlisted}", _OTHER_LIBRARY) from error


def _unlisted_gpu(backend: Backend) -> str:
    """The message about this machine's GPU if the library does not list it, else nothing."""
    found = find_gpus()
    if not found.gpus or backend.supports(found.gpus[0]):
        return ""
    return unsupported_gpu(backend, found.gpus[0])


def _causes(errors: list[str]) -> list[str]:
    """The errors without the remark that there is no driver, which a build without a GPU adds to any failure."""
    causes = [text for text in errors if "cudaError 35" not in text]
    return causes or errors


def first_line(errors: list[str]) -> str:
    """The first thing that the library said, or that it said nothing."""
    lines = [line for text in errors for line in text.splitlines() if line.strip()]
    return lines[0].strip() if lines else "the library gave no reason"


def _rest(errors: list[str]) -> str:
    others = [text.splitlines()[0].strip() for text in errors[1:4] if text.strip()]
    return "; ".join(others) if others else "`repvgg-deploy doctor` shows what this machine can do"
