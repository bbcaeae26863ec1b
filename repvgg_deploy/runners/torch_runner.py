"""Checkpoints in torch."""

from __future__ import annotations

import torch

from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.runners import Array


class TorchRunner:
    """A net in torch eager mode, on the CPU, in the type of its weights."""

    backend = "torch-cpu"
    backend_version: str = torch.__version__
    batch = None

    def __init__(self, net: RepVGG) -> None:
        self._net = net.eval()
        self._dtype = net.classifier.weight.dtype
        self.precision = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16"}[self._dtype]

    def run(self, images: Array) -> dict[str, Array]:
        """`logits` (N, classes) of normalized images (N, C, H, W)."""
        with torch.inference_mode():
            logits: Array = self._net(torch.from_numpy(images).to(self._dtype)).numpy()
        return {"logits": logits}
