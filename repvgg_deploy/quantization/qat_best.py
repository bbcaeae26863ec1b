"""The best state along a run, by the float net's answers on images that are held out of the training.

The loss of single batches cannot tell which state is best: the batches differ, and the net has seen their images. The
start is a state like any other, so that no run ends worse than it began.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg_deploy.quantization.points import BATCH
from repvgg_deploy.quantization.qat_training import QatTraining, saturations, set_saturation


@dataclass(frozen=True)
class BestSoFar:
    """What `BestState` continues from: the step, its cost, and the student's tensors; none before the first."""

    step: int
    cost: float
    student: Mapping[str, Tensor]


class BestState:
    """The student of the step with the least cost among those that were offered; the first of equal ones.

    The cost is the divergence, the mean over the images of Kullback and Leibler's, of the student's classes from the
    float net's, in nats. Where the share of images with the same class moves by whole images, it tells how near the
    others are. A run that learns labels leaves the float net for them: then their cross-entropy is added, with the
    weight that it has in the training.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        """`images`: normalized (N, C, H, W), held out of the training; `labels`: their classes (N), if they count."""
        self.step = 0
        self.cost = math.inf
        self._images = images
        self._labels = labels
        self._student: dict[str, Tensor] = {}
        self._wanted: Tensor | None = None

    @torch.no_grad()
    def offer(self, training: QatTraining) -> dict[str, float]:
        """Keep the student as it is now, if it is better; its agreement in percent, and its divergence.

        Both are the mean of what the engines compute that it is for: TensorRT and ONNX Runtime saturate at different
        integers.
        """
        if self._wanted is None:
            self._wanted = self._run(training.teacher.net)
        training.student.eval()
        same, divergence, cost = 0.0, 0.0, 0.0
        engines = saturations(training.student)
        for highest in engines:
            set_saturation(training.student, highest)
            given = self._run(training.student)
            same += float((given.argmax(1) == self._wanted.argmax(1)).double().mean()) / len(engines)
            parts = F.kl_div(given.log_softmax(1), self._wanted.log_softmax(1), reduction="none", log_target=True)
            divergence += float(parts.sum(1).mean()) / len(engines)
            if self._labels is not None:
                cost += training.options.labels * float(F.cross_entropy(given, self._labels)) / len(engines)
        training.student.train()
        cost += divergence
        # Not a number is not less.
        if cost < self.cost:
            self.step, self.cost = training.done, cost
            self._student = {name: value.clone() for name, value in training.student.state_dict().items()}
        return {"held_out_agreement": 100 * same, "held_out_divergence": divergence}

    def put_into(self, training: QatTraining) -> None:
        """Give the student the values that it had at the best step."""
        training.student.load_state_dict(self._student)

    def state(self) -> BestSoFar:
        """Everything that `restore` needs to continue."""
        return BestSoFar(self.step, self.cost, self._student)

    def restore(self, state: BestSoFar) -> None:
        """Continue from what `state` returned."""
        self.step, self.cost, self._student = state.step, state.cost, dict(state.student)

    def _run(self, net: torch.nn.Module) -> Tensor:
        device = next(net.parameters()).device
        return torch.cat([net(batch.to(device)).double().cpu() for batch in torch.split(self._images, BATCH)])
