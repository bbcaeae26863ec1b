"""Predictions on a Ray cluster: Ray Data distributes the images and retries, each of its actors has a `Predictor`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from repvgg_deploy.errors import DeployError
from repvgg_deploy.images.archives import TarMember
from repvgg_deploy.images.sources import ImageSource, Unreadable
from repvgg_deploy.serving.predictor import PredictorSpec
from repvgg_deploy.serving.tables import import_pyarrow, make_table


@dataclass(frozen=True)
class RayOptions:
    """Where and how predictions are distributed.

    Attributes:
        address: of the cluster; `auto` finds the one that runs on this machine, `local` starts one that ends with the
            command.
        actors: how many predictors.
        cpus: cores of each actor, which decodes and infers with as many threads.
        gpus: GPUs of each actor; a fraction shares one.
    """

    address: str = "auto"
    actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


def import_ray() -> Any:
    """The module `ray`, with `ray.data`.

    Raises:
        DeployError: the package is not installed.
    """
    # Read when Ray is loaded: no report of who uses it, and none of its own log lines between those of the command.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DeployError("Ray is not installed", "pip install 'repvgg-deploy[ray]'") from error
    return ray


@contextmanager
def connect(options: RayOptions) -> Iterator[Any]:
    """Ray, connected to the cluster; a connection that was there before stays.

    Raises:
        DeployError: there is no cluster at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    local = options.address == "local"
    try:
        ray.init(
            address=options.address,
            log_to_driver=False,
            logging_level="error",
            **({"include_dashboard": False} if local else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DeployError(
            f"there is no Ray cluster at {options.address}: {str(error).splitlines()[0]}",
            "start one with `ray start --head`, or give `local` as the address",
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


class PredictorActor:
    """What each actor runs: batches of images in, batches of predictions out."""

    def __init__(self, spec: PredictorSpec) -> None:
        self._predictor = spec.open()

    def __call__(self, batch: Any) -> Any:
        """A table of predictions for a table of `encode_sources`, with its `index`."""
        rows = batch.to_pylist()
        predictions = self._predictor([_decode_source(row) for row in rows])
        table = make_table(prediction.to_dict() for prediction in predictions)
        return table.append_column("index", batch["index"])


def encode_sources(sources: Sequence[ImageSource], first: int = 0) -> Any:
    """Where images are, as a table that can travel; `index` counts from `first`."""
    rows = [{"index": first + number, **_encode_source(source)} for number, source in enumerate(sources)]
    return import_pyarrow().Table.from_pylist(rows)


def _encode_source(source: ImageSource) -> dict[str, Any]:
    # Names that are not UTF-8 cannot be Arrow strings.
    if isinstance(source, TarMember):
        member = source.name.encode("utf-8", "surrogateescape")
        return {**_place(source.archive), "member": member, "offset": source.offset, "size": source.size, "reason": ""}
    if isinstance(source, Unreadable):
        return {**_place(source.path), "member": b"", "offset": 0, "size": 0, "reason": source.reason}
    return {**_place(source), "member": b"", "offset": 0, "size": 0, "reason": ""}


def _place(path: Path) -> dict[str, Any]:
    return {"file": os.fsencode(path)}


def _decode_source(row: dict[str, Any]) -> ImageSource:
    path = Path(os.fsdecode(row["file"]))
    if row["reason"]:
        return Unreadable(path, row["reason"])
    if row["member"]:
        return TarMember(path, row["member"].decode("utf-8", "surrogateescape"), row["offset"], row["size"])
    return path


_MOST_PER_PART = 4096


def _part_size(images: int, batch: int, actors: int) -> int:
    """Images per part, which is one file of the output and what is run anew when a node dies: whole batches."""
    # About four for each actor, so that quicker ones may take more of them.
    wanted = min(_MOST_PER_PART, ceil(images / (4 * actors)))
    return max(1, ceil(wanted / batch)) * batch


@dataclass(frozen=True)
class ModelFacts:
    """What the cluster says of a model, which the machine that asks may not be able to open."""

    class_names: tuple[str, ...] | None
    classes: int | None
    backend: str
    precision: str


def describe_model(spec: PredictorSpec) -> ModelFacts:
    """The facts of a model, where it is opened."""
    model = spec.open().model
    return ModelFacts(model.class_names, model.classes, model.runner.backend, model.runner.precision)


def describe_on_cluster(ray: Any, spec: PredictorSpec, options: RayOptions) -> ModelFacts:
    """`describe_model` on a node that has what an actor needs."""
    task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus)(describe_model)
    facts: ModelFacts = ray.get(task.remote(spec))
    return facts


def predict_dataset(ray: Any, spec: PredictorSpec, sources: Sequence[ImageSource], options: RayOptions) -> Any:
    """A Ray dataset of predictions, in the order of `sources`, with their `index`; nothing is run yet.

    The files must have the same paths on all nodes. Ray starts an actor that died anew and runs its batch again.
    """
    spec = _within_cores(spec, options)
    size = _part_size(len(sources), spec.options.batch, options.actors)
    parts = [encode_sources(sources[start : start + size], start) for start in range(0, len(sources), size)]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    return ray.data.from_arrow(parts).map_batches(
        PredictorActor,
        fn_constructor_args=(spec,),
        batch_size=spec.options.batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(options.actors, len(parts))),
        num_cpus=options.cpus,
        num_gpus=options.gpus or None,
    )


def _within_cores(spec: PredictorSpec, options: RayOptions) -> PredictorSpec:
    """`spec` with threads for the cores of one actor: a node may have many actors, each of which sees all its cores."""
    cores = max(1, ceil(options.cpus))
    decoding = spec.options.decoding
    decoding = replace(decoding, workers=decoding.workers or cores)
    return replace(spec, threads=spec.threads or cores, options=replace(spec.options, decoding=decoding))


@contextmanager
def explain_failures(ray: Any) -> Iterator[None]:
    """Turn an error of the work on the cluster into one that says what failed there.

    Raises:
        DeployError: instead of Ray's own exceptions.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DeployError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, DeployError):
            raise DeployError(cause.message, cause.hint) from error
        said = [line for line in str(error).splitlines() if line.strip()]
        raise DeployError(
            f"the work on the Ray cluster failed: {said[-1] if said else type(error).__name__}",
            "the files must have the same paths on all nodes; Ray's logs say more",
        ) from error
