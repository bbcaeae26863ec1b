"""What the stages of an export are held against: the net as it was trained, run in float64."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG


@torch.no_grad()
def run_in_float64(net: RepVGG, images: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Logits (N, classes) of `net` in float64 arithmetic, whatever its own type; `net` is not changed.

    No kernel is in float64 as a whole, so this takes little more memory than `net` itself.
    """
    x = torch.from_numpy(np.asarray(images, dtype=np.float64))
    for block in net.blocks():
        # deepcopy takes what it finds in the memo for the copy: so the kernels are not copied.
        memo: dict[int, object] = {id(m): _Float64Conv(m) for m in block.modules() if isinstance(m, nn.Conv2d)}
        x = copy.deepcopy(block, memo).double()(x)
    logits = nn.functional.linear(x.mean((2, 3)), net.classifier.weight.double(), net.classifier.bias.double())
    return cast("NDArray[np.float64]", logits.numpy())


class _Float64Conv(nn.Module):
    """A convolution in float64 whose kernel is widened some output channels at a time, not as a whole."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        # In a tuple, so that .double() does not reach it.
        self._conv = (conv,)

    def forward(self, x: Tensor) -> Tensor:
        (conv,) = self._conv
        geometry = (conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        kernel_size, dilation, padding, stride = (cast("tuple[int, int]", pair) for pair in geometry)
        columns = nn.functional.unfold(x, kernel_size, dilation, padding, stride)
        # (N, groups·k, pixels) to (groups, k, N·pixels): all images in one matrix product.
        pixels = columns.shape[2]
        columns = columns.reshape(len(x), conv.groups, -1, pixels).permute(1, 2, 0, 3).flatten(2)
        kernel = conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
        out = columns.new_empty(conv.groups, kernel.shape[1], columns.shape[2])
        step = max(1, _WIDENED_VALUES // kernel.shape[2])
        for group in range(conv.groups):
            for start in range(0, kernel.shape[1], step):
                rows = slice(start, start + step)
                torch.mm(kernel[group, rows].double(), columns[group], out=out[group, rows])
        height = (x.shape[2] + 2 * padding[0] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
        out = out.reshape(conv.out_channels, len(x), height, pixels // height).transpose(0, 1)
        bias: Tensor | None = conv.bias
        return out if bias is None else out + bias.double()[:, None, None]


# 16 MB of float64: the memory is used again for the next channels, and the threads meet seldom.
_WIDENED_VALUES = 1 << 21


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
