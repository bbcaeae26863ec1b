"""The learning curves of `qat`: one row at the start and per tenth of the run, as a table and in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import torch

from repvgg_deploy.quantization.qat_best import BestState
from repvgg_deploy.quantization.qat_training import QatTraining, set_saturation
from repvgg_deploy.quantization.target import UNSIGNED_HIGHEST
from repvgg_deploy.workflows.qat_images import TrainingImages

_SEEN = 64


def measure_row(training: QatTraining, best: BestState, validation: TrainingImages | None) -> dict[str, float]:
    """The row of the state as it is now, which is offered to `best`; before the first step it has no loss."""
    means = training.means() if training.done else {}
    return {"step": training.done, **means, **best.offer(training), **_validate(training, validation)}


@torch.no_grad()
def _validate(training: QatTraining, images: TrainingImages | None) -> dict[str, float]:
    """Top-1 and the agreement with the float net, as ONNX Runtime computes it."""
    if images is None:
        return {}
    set_saturation(training.student, UNSIGNED_HIGHEST)
    training.student.eval()
    hits = same = 0
    for start in range(0, len(images), _SEEN):
        pictures, labels = images.take(torch.arange(start, min(start + _SEEN, len(images))))
        pictures = pictures.to(training.device)
        best = training.student(pictures).argmax(1)
        same += int((best == training.teacher.net(pictures).argmax(1)).sum())
        hits += int((best.cpu() == labels).sum())
    training.student.train()
    return {"val_top1": 100 * hits / len(images), "val_agreement": 100 * same / len(images)}


def describe_row(row: Mapping[str, float]) -> str:
    """One line for a person who waits."""
    words = [f"step {row['step']:.0f}: held-out agreement {row['held_out_agreement']:.1f} %"]
    if "loss" in row:
        words.append(f"loss {row['loss']:.4f}")
    if "val_top1" in row:
        words.append(f"validation top-1 {row['val_top1']:.2f} %, agreement {row['val_agreement']:.2f} %")
    return "; ".join(words)


def to_csv(rows: Sequence[Mapping[str, float]]) -> str:
    """The rows as a table; a field that a row does not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, max(rows, key=len), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
