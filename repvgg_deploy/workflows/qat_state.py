"""The file that a stopped run of `qat` continues from: tensors by name, and what is known of them as JSON.

It lies beside the output, where anyone may have put it. So it is read as checkpoints are: nothing in it is executed,
checksums are compared, and each tensor has to be one that the run has.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, cast

import torch
from msgspec import Meta
from torch import Tensor

from repvgg_deploy.checkpoints.archives import Archive, open_archive
from repvgg_deploy.checkpoints.sources import open_source
from repvgg_deploy.checkpoints.stored import StoredTensor
from repvgg_deploy.checkpoints.torch_files import read_torch_archive
from repvgg_deploy.errors import CheckpointError, DeployError
from repvgg_deploy.files.printable import printable
from repvgg_deploy.files.typed_values import Sha256, convert, parse_json
from repvgg_deploy.quantization.qat_best import BestSoFar
from repvgg_deploy.quantization.qat_training import QatTraining, TrainingState

_HINT = "delete it to start over, or give another -o"
# Raised when what a state contains changes.
_VERSION = 3

_Rate = Annotated[float, Meta(ge=0, le=1e20)]
# The loss is relative, the rest are percentages and numbers of steps.
_Value = Annotated[int, Meta(ge=0, le=1 << 32)] | Annotated[float, Meta(ge=0, le=1e10)]
# None is a divergence that is no number.
_Rows = Annotated[tuple[dict[str, _Value | None], ...], Meta(max_length=1000)]
_ALWAYS = {"step", "held_out_agreement", "held_out_divergence"}
_LATER = {"loss", "agreement"}
_ODD = "held_out_divergence"
_VALIDATED = {"val_top1", "val_agreement"}


@dataclass(frozen=True)
class _About:
    version: int
    identity: Sha256
    done: Annotated[int, Meta(ge=0, le=1 << 32)]
    rates: Annotated[tuple[_Rate, ...], Meta(max_length=100_000)]
    since: Annotated[dict[str, Annotated[float, Meta(ge=0, le=1e20)]], Meta(max_length=10)]
    best_step: Annotated[int, Meta(ge=0, le=1 << 32)]
    best_cost: Annotated[float, Meta(ge=0, le=1e20)] | None
    rows: _Rows


@dataclass(frozen=True)
class SavedRun:
    """A run as it was saved.

    Attributes:
        identity: the sha256 of what must be the same for the run to continue.
        rows: its learning curves so far.
        training: the student and its optimizer.
        teacher: the tensors of the float net.
        best: the best state so far.
    """

    identity: str
    rows: tuple[dict[str, float], ...]
    training: TrainingState
    teacher: Mapping[str, Tensor]
    best: BestSoFar


def save_run(run: SavedRun, file: IO[bytes]) -> None:
    """Write a run to an open file."""
    training, best = run.training, run.best
    about = {
        "version": _VERSION,
        "identity": run.identity,
        "done": training.done,
        "rates": training.rates,
        "since": training.since,
        "best_step": best.step,
        "best_cost": _finite(best.cost),
        "rows": [{name: _finite(value) for name, value in row.items()} for row in run.rows],
    }
    text = json.dumps(about, allow_nan=False)
    tensors = {"training": training.tensors, "teacher": run.teacher, "best": dict(best.student)}
    # Not written by torch itself, which does not mention a full disk.
    content = io.BytesIO()
    torch.save({"about": text, **tensors}, content)
    file.write(content.getbuffer())


def _finite(value: float) -> float | None:
    """The number; None for what JSON has no word for."""
    return value if math.isfinite(value) else None


def load_run(path: Path, identity: str, fresh: QatTraining) -> SavedRun:
    """The run in a file; it has the tensors of `fresh`, the same run before its first step, with other values.

    Raises:
        DeployError: the file is damaged, was written by something else, or is of another run.
    """
    name = f"the saved run {path}"
    try:
        with open_source(path) as source:
            archive = open_archive(source, str(path))
            if not archive.has_checksums:
                raise CheckpointError(f"{path} has no checksums")
            text, training, teacher, best = _read_parts(archive)
            about = convert(parse_json(text.encode("utf-8", "replace"), name, _HINT), _About, name, _HINT)
            if about.version != _VERSION or about.identity != identity:
                raise DeployError(f"{path} belongs to another run: other settings, images or checkpoint", _HINT)
            _check_about(about, fresh)
            state = TrainingState(about.done, about.rates, about.since, _load(training, *fresh.known_tensors()))
            _check_moments(state)
            student = fresh.student.state_dict()
            # Before a state was better than none there is no best one.
            kept = _load(best, student, {}) if best or about.best_cost is not None else {}
            cost = math.inf if about.best_cost is None else about.best_cost
            rows = tuple({k: math.nan if v is None else v for k, v in row.items()} for row in about.rows)
            float_net = _load(teacher, fresh.teacher.net.state_dict(), {})
            return SavedRun(identity, rows, state, float_net, BestSoFar(about.best_step, cost, kept))
    except CheckpointError as error:
        raise DeployError(f"{path} is not the saved state of a run, or a damaged one: {error}", _HINT) from error


_Tensors = Mapping[str, StoredTensor]


def _read_parts(archive: Archive) -> tuple[str, _Tensors, _Tensors, _Tensors]:
    try:
        value = read_torch_archive(archive).value
    except CheckpointError:
        raise
    except Exception as error:
        # A damaged pickle is a corrupted program, so reading it can raise nearly any exception.
        raise CheckpointError(f"it is truncated or damaged ({printable(str(error))})") from error
    names = ("about", "training", "teacher", "best")
    text, *groups = [value.get(key) if isinstance(value, Mapping) else None for key in names]
    if not isinstance(text, str) or not all(map(_is_tensors, groups)):
        raise CheckpointError("it has other contents")
    training, teacher, best = (cast(_Tensors, group) for group in groups)
    return text, training, teacher, best


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(item, StoredTensor) for name, item in value.items()
    )


def _check_about(about: _About, fresh: QatTraining) -> None:
    """Raise CheckpointError if what is said of a run cannot be true of it."""
    if about.done > fresh.options.steps or len(about.rates) != len(fresh.optimizer.param_groups):
        raise CheckpointError("it has more steps than the run, or other groups of tensors")
    for number, row in enumerate(about.rows):
        # Before the first step there is no loss; validation images may come and go between two runs.
        later = _LATER if number else set()
        validated = _VALIDATED if _VALIDATED & row.keys() else set()
        if row.keys() != _ALWAYS | later | validated or any(row[name] is None for name in row if name != _ODD):
            raise CheckpointError("its curves have other columns")
    steps = [step for row in about.rows if isinstance(step := row["step"], int) and step <= about.done]
    if len(steps) != len(about.rows) or steps != sorted({*steps}):
        raise CheckpointError("its curves have other steps")
    if about.since.keys() not in (set(), {"steps", *_LATER}) or (about.done and not about.rows):
        raise CheckpointError("its curves have no beginning")
    if about.best_step > about.done:
        raise CheckpointError("its best step is still to come")


def _check_moments(state: TrainingState) -> None:
    """Raise CheckpointError if Adam cannot go on with its moments: one is missing, negative, or of another step."""
    moments = {name: value for name, value in state.tensors.items() if name.startswith("optimizer.")}
    for index in {name.split(".")[1] for name in moments}:
        step, mean, square = (moments.get(f"optimizer.{index}.{name}") for name in ("step", "exp_avg", "exp_avg_sq"))
        if step is None or mean is None or square is None or float(step) != state.done or bool((square < 0).any()):
            raise CheckpointError(f"the moments of tensor {index} are not those of step {state.done}")


def _load(stored: _Tensors, required: Mapping[str, Tensor], optional: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors: all `required` and any of `optional` ones, by name, shape and type; finite, in memory of their own.

    Raises:
        CheckpointError: they are others, or damaged.
    """
    known = {**optional, **required}
    other = next((name for name in (*required, *stored) if name not in stored or name not in known), None)
    if other is not None:
        raise CheckpointError(f"{printable(other)} is {'missing' if other in known else 'not a tensor of the run'}")
    loaded = {}
    for name, item in stored.items():
        like = known[name]
        if item.shape != tuple(like.shape) or f"torch.{item.dtype.name}" != str(like.dtype):
            raise CheckpointError(f"{printable(name)} is {item.dtype.name} of the shape {item.shape!s:.60}")
        # A copy: a file can let two tensors, or all numbers of one, share one place.
        values = torch.from_numpy(item.load(printable(name))).clone()
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{printable(name)} has values that are not finite")
        loaded[name] = values
    return loaded
