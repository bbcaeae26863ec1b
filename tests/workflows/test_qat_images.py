"""The images of quantization-aware training: which of them are held out."""

from __future__ import annotations

import pytest
import torch

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.workflows.qat_images import TrainingImages, hold_out


def numbered(count: int) -> TrainingImages:
    """Images of one pixel, which is their number."""
    return TrainingImages((), Preprocessing(), made=torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize(("count", "held"), [(128, 16), (1000, 125), (50_000, 128)])
def test_no_image_is_both_trained_on_and_held_out(count, held) -> None:
    split = hold_out(numbered(count))
    assert len(split.held_out) == held
    assert len(split) == count - held
    trained, labels = split.take(torch.arange(len(split)))
    assert labels is None
    assert sorted(torch.cat([trained, split.held_out]).flatten().tolist()) == list(range(count))
    # Of all classes, where the images come in their order.
    steps = split.held_out.flatten().diff()
    assert float(steps.max() - steps.min()) <= 1


@pytest.mark.parametrize("count", [1, 127])
def test_few_images_serve_both_purposes(count) -> None:
    split = hold_out(numbered(count))
    assert len(split) == len(split.held_out) == count
