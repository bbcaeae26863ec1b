"""Blocks of other libraries that no package of the tests has, written down by what they compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(cin: int, cout: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size but for its stride, and its BN."""
    padding = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(cin, cout, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout))


class SumOfBranches(nn.Module):
    """As MobileOne trains: several k×k branches, a 1×1 branch (`scale`), a BN of the input (`skip`), an activation."""

    def __init__(
        self,
        cin: int,
        cout: int,
        kernels: tuple[int, ...] = (3, 3, 3),
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        scale: bool = True,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.many = nn.ModuleList(
            conv_norm(cin, cout, kernel, stride, dilation if kernel > 1 else 1, groups) for kernel in kernels
        )
        self.scale = conv_norm(cin, cout, 1, stride, groups=groups) if scale else None
        self.skip = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None
        self.then = nn.ReLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        total = 0 if self.skip is None else self.skip(x)
        if self.scale is not None:
            total = total + self.scale(x)
        for branch in self.many:
            total = total + branch(x)
        return self.then(total)


class YoloRepConv(nn.Module):
    """As YOLOv7's RepConv: Sequential branches, SiLU, and attributes that the net around it reads."""

    def __init__(self, cin: int, cout: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(cin) if cin == cout else None
        self.rbr_dense = conv_norm(cin, cout, 3)
        self.rbr_1x1 = conv_norm(cin, cout, 1)
        self.act = nn.SiLU() if act is None else act
        self.f, self.i = -1, 7

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.act(self.rbr_dense(x) + self.rbr_1x1(x) + skip)


class ScaledBranches(nn.Module):
    """As RepOptimizers' CSLA block: a learned factor per channel behind each branch, and a functional ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.point = nn.Conv2d(channels, channels, 1, bias=True)
        self.wide_factor = nn.Parameter(torch.rand(channels))
        self.point_factor = nn.Parameter(torch.rand(1, channels, 1, 1))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        total = self.wide(x) * self.wide_factor.view(1, -1, 1, 1) + self.point_factor * self.point(x) + x
        return F.relu(self.norm(total))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 have it: buffers only, without a number of batches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def freeze_norms(module: nn.Module) -> nn.Module:
    """`module` itself, its BNs replaced by frozen ones."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features))
        else:
            freeze_norms(child)
    return module
