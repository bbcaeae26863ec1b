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
def run_in_float64(net: RepVGG, images: NDArray[np.floating[Any]]) -> dict[str, NDArray[np.float64]]:
    """The outputs of `net` in float64 arithmetic, whatever its own type; `net` is not changed.

    No kernel is in float64 as a whole, so this takes little more memory than `net` itself.
    """
    x = torch.from_numpy(np.asarray(images, dtype=np.float64))
    wide = x.new_empty(_WIDENED_VALUES)
    found: dict[str, NDArray[np.float64]] = {}
    for name, block in net.named_blocks():
        # deepcopy takes what it finds in the memo for the copy: so the kernels are not copied.
        memo: dict[int, object] = {id(m): _Float64Conv(m, wide) for m in block.modules() if isinstance(m, nn.Conv2d)}
        x = copy.deepcopy(block, memo).double()(x)
        if name in net.map_names:
            found[net.map_names[name]] = x.numpy()
    if found:
        return found
    x = x.mean((2, 3))
    for linear in cast("list[nn.Linear]", list(net.hidden)):
        x = torch.relu(nn.functional.linear(x, linear.weight.double(), linear.bias.double()))
    if net.has_classifier:
        x = nn.functional.linear(x, net.classifier.weight.double(), net.classifier.bias.double())
    return {net.spec.output_names[0]: x.numpy()}


class _Float64Conv(nn.Module):
    """A convolution in float64 whose kernel is widened some output channels at a time, into `wide`."""

    def __init__(self, conv: nn.Conv2d, wide: Tensor) -> None:
        super().__init__()
        # In a tuple, so that .double() does not reach it.
        self._conv = (conv, wide)

    def forward(self, x: Tensor) -> Tensor:
        conv, wide = self._conv
        geometry = (conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        kernel_size, dilation, padding, stride = (cast("tuple[int, int]", pair) for pair in geometry)
        columns = nn.functional.unfold(x, kernel_size, dilation, padding, stride)
        # (N, groups·k, pixels) to (groups, N·pixels, k): all images in one matrix product, the kernel on its right. The
        # last maps have few pixels, and a product of few columns takes half as long again as one of few rows.
        pixels = columns.shape[2]
        columns = columns.reshape(len(x), conv.groups, -1, pixels).permute(1, 0, 3, 2).flatten(1, 2)
        kernel = conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
        out = columns.new_empty(conv.groups, columns.shape[1], kernel.shape[1])
        step = max(1, len(wide) // kernel.shape[2])
        for group in range(conv.groups):
            for start in range(0, kernel.shape[1], step):
                part = kernel[group, start : start + step]
                # A row may be longer than the buffer, in a net of unusual width.
                space = wide[: part.numel()] if part.numel() <= len(wide) else wide.new_empty(part.numel())
                widened = space.view(part.shape).copy_(part)
                torch.mm(columns[group], widened.t(), out=out[group, :, start : start + step])
        height = (x.shape[2] + 2 * padding[0] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
        # (groups, N·pixels, channels) to (N, groups·channels, pixels).
        out = out.reshape(conv.groups, len(x), pixels, -1).permute(1, 0, 3, 2)
        out = out.reshape(len(x), conv.out_channels, height, pixels // height)
        bias: Tensor | None = conv.bias
        return out if bias is None else out + bias.double()[:, None, None]


# 16 MB of float64: used again for the next channels, and enough for the threads to meet seldom.
_WIDENED_VALUES = 1 << 21


@torch.no_grad()
def run_fused(
    net: RepVGG, *inputs: NDArray[np.floating[Any]]
) -> tuple[list[dict[str, NDArray[np.float32]]], dict[str, float]]:
    """The outputs of a fused net in float32 for each of `inputs`, and each convolution's largest magnitude."""
    xs = [torch.from_numpy(np.asarray(images, dtype=np.float32)) for images in inputs]
    largest: dict[str, float] = {}
    found: list[dict[str, NDArray[np.float32]]] = [{} for _ in xs]
    for name, block in net.named_blocks():
        fused = cast(FusedBlock, block)
        totals = [fused.conv(x) for x in xs]
        largest[name] = max(float(total.abs().max()) for total in totals)
        xs = [fused.se_after(fused.act(fused.se_before(total))) for total in totals]
        if name in net.map_names:
            for outputs, x in zip(found, xs, strict=True):
                outputs[net.map_names[name]] = x.numpy()
    if not net.spec.maps:
        found = [{net.spec.output_names[0]: net.head(x).numpy()} for x in xs]
    return found, largest
