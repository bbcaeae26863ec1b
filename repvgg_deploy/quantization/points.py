"""The places of a fused net where activations are quantized, and how to walk along them.

A quantization point is named after the layer that reads it: one per block (the input of its convolution), then
`pool` (the input of the global average pool; of a backbone, its last map) and `classifier` (the pooled features).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG

POOL = "pool"
CLASSIFIER = "classifier"

Images = Iterable[NDArray[np.float32] | Tensor]
"""Batches of normalized images, float32 (N, C, H, W); may be iterated more than once."""

BATCH = 32
"""Images at a time inside the quantizer, whatever the caller's batches: so results cannot depend on those."""


def fused_blocks(net: RepVGG) -> list[tuple[str, FusedBlock]]:
    """The blocks of a fused net with their names, in the order of execution."""
    return [(name, cast(FusedBlock, block)) for name, block in net.named_blocks()]


def point_names(net: RepVGG) -> list[str]:
    """All points, in the order of execution."""
    blocks = [name for name, _ in net.named_blocks()]
    return [*blocks, POOL, CLASSIFIER] if net.has_classifier else [*blocks, POOL]


def point_channels(net: RepVGG) -> dict[str, int]:
    """The channels of each point, in the order of execution."""
    inside = [block.conv.in_channels for _, block in fused_blocks(net)]
    return dict(zip(point_names(net), [*inside, net.spec.features, net.spec.features], strict=False))


def layer_names(net: RepVGG) -> list[str]:
    """All layers with weights, in the order of execution."""
    return [name for name in point_names(net) if name != POOL]


def walk(net: RepVGG, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Run `net` on images (N, C, H, W) and give each point's name and tensor on the way."""
    for name, block in net.named_blocks():
        yield name, x
        x = block(x)
    yield POOL, x
    if net.has_classifier:
        yield CLASSIFIER, x.mean((2, 3))


def after_conv(block: FusedBlock, x: Tensor) -> Tensor:
    """What a block does after its convolution: squeeze-excites and the activation."""
    return cast(Tensor, block.se_after(block.act(block.se_before(x))))


def rebatch(images: Images, device: torch.device, size: int = BATCH) -> Iterator[Tensor]:
    """The same images in the same order, `size` at a time (the last batch may be smaller)."""
    waiting: list[Tensor] = []
    count = 0
    for given in images:
        batch = torch.as_tensor(given, dtype=torch.float32)
        while len(batch):
            part, batch = batch[: size - count], batch[size - count :]
            waiting.append(part)
            count += len(part)
            if count == size:
                yield _stack(waiting, device)
                waiting, count = [], 0
    if waiting:
        yield _stack(waiting, device)


def _stack(parts: list[Tensor], device: torch.device) -> Tensor:
    # On a CPU torch's float32 convolutions take as long so, or up to a third less (tried with 48 to 192 channels).
    return torch.cat(parts).to(device).contiguous(memory_format=torch.channels_last)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """`values` (C) shaped so that they scale the first dimension of `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """Keyword arguments of `torch.nn.functional.conv2d`."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
