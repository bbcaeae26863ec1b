"""What the stages of an export are held against: the net as it was trained, run in float64."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG


@torch.no_grad()
def run_in_float64(net: RepVGG, images: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Logits (N, classes) of `net` in float64 arithmetic, whatever its own type; `net` is not changed.

    One block at a time is in float64, so the net is never in memory twice.
    """
    x = torch.from_numpy(np.asarray(images, dtype=np.float64))
    workspace: dict[str, Tensor] = {}
    for block in net.blocks():
        wide = {
            name: _widen(name, tensor, workspace)
            for name, tensor in block.state_dict().items()
            if tensor.is_floating_point()
        }
        x = torch.func.functional_call(block, wide, (x,))
    logits = torch.nn.functional.linear(x.mean((2, 3)), net.classifier.weight.double(), net.classifier.bias.double())
    return cast("NDArray[np.float64]", logits.numpy())


def _widen(name: str, tensor: Tensor, workspace: dict[str, Tensor]) -> Tensor:
    """`tensor` in float64, in memory that the blocks share: fresh pages would cost more than the arithmetic."""
    if name not in workspace or workspace[name].numel() < tensor.numel():
        workspace[name] = torch.empty(tensor.numel(), dtype=torch.float64)
    return workspace[name][: tensor.numel()].view(tensor.shape).copy_(tensor)


@torch.no_grad()
def run_fused(net: RepVGG, images: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Logits (N, classes) of a fused net in float32, and the largest magnitude that each convolution gives."""
    x = torch.from_numpy(np.asarray(images, dtype=np.float32))
    largest: dict[str, float] = {}
    for name, block in net.named_blocks():
        fused = cast(FusedBlock, block)
        total = fused.conv(x)
        largest[name] = float(total.abs().max())
        x = fused.se_after(fused.act(fused.se_before(total)))
    return net.head(x).numpy(), largest
