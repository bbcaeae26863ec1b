"""The request that `qat` takes, the result that it returns, and the files beside the checkpoint it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repvgg_deploy.artifacts import Parity, PreprocessingOptions
from repvgg_deploy.checkpoints import CheckpointOptions
from repvgg_deploy.quantization.qat import QatOptions
from repvgg_deploy.quantization.qat_training import TrainingOptions


@dataclass(frozen=True)
class QatRequest:
    """The request that `qat` takes.

    Attributes:
        checkpoint: in training form, or with `from_deploy` in deploy form.
        output: the checkpoint to write; the scales, the curves and the state of the run go beside it.
        data: images to train on, with or without labels; None for images synthesized from BN statistics.
        calibration: images for the initial scales; None for synthesized ones.
        validation: labelled images for the top-1 and the agreement during training.
        recipe: of the INT8 export that training starts from.
        epochs: passes over the images, instead of `training.steps`.
        read: how the checkpoint is read.
        training, options: see `TrainingOptions` and `QatOptions`.
        from_deploy: a deploy form is taken: BNs are inserted, trained and fused again.
        device: `cpu` or `cuda`.
        interval_s: the longest time between saved states, in seconds.
        strict: an image that cannot be read is an error.
    """

    checkpoint: Path
    output: Path
    data: Path | None
    calibration: Path | None
    training: TrainingOptions
    validation: Path | None = None
    recipe: str | Path = "accurate"
    epochs: int | None = None
    options: QatOptions = field(default_factory=QatOptions)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    read: CheckpointOptions = field(default_factory=CheckpointOptions)
    from_deploy: bool = False
    device: str = "cpu"
    interval_s: float = 60.0
    strict: bool = False


@dataclass(frozen=True)
class QatResult:
    """What was written, and how the INT8 net that the files give compares with the trained one: `parity`.

    `rows` are the learning curves, at the start and per tenth of the run; the state of `best_step` was written.
    `picture` is the plot of the curves, if matplotlib is installed.
    """

    checkpoint: Path
    scales: Path
    curves: Path
    picture: Path | None
    steps: int
    best_step: int
    resumed_at: int
    rows: tuple[dict[str, float], ...]
    parity: Parity
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The object that `qat --json` prints."""
        paths: dict[str, str | None] = {name: str(getattr(self, name)) for name in ("checkpoint", "scales", "curves")}
        paths["picture"] = None if self.picture is None else str(self.picture)
        rows = {"start": self.rows[0], "rows": list(self.rows[1:])}
        return {**vars(self), **paths, **rows, "parity": self.parity.to_dict()}


def scales_path(output: Path) -> Path:
    """The file of the scales beside a checkpoint."""
    return output.with_name(f"{output.stem}.scales.npz")


def curves_path(output: Path) -> Path:
    """The file of the learning curves beside a checkpoint."""
    return output.with_name(f"{output.stem}.curves.csv")


def state_path(output: Path) -> Path:
    """The file that a stopped run continues from; it is removed when the run has ended."""
    return output.with_name(f"{output.stem}.qat-state.pt")
