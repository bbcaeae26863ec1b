"""A pickle of whole modules tells strides, activation and ε, which no tensor does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.library_nets import OFFICIAL, Block, Official
from torch import Tensor, nn

from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.nets.settings import StructureOptions

Save = Callable[..., Path]
STRIDES = (1, 1, 2, 2, 1)


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model = net


def make_net(act: nn.Module | None = None) -> Official:
    net = Official()
    blocks = [net.get_submodule(name) for name in ("stage0", "stage1.0", "stage2.0", "stage3.0", "stage4.0")]
    for block, stride in zip(blocks, STRIDES, strict=True):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (stride, stride)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
        if isinstance(module, Block) and act is not None:
            module.nonlinearity = act
    return net.eval()


@pytest.mark.parametrize(
    "wrap", [lambda n: n, Wrapped, lambda n: {"model": nn.DataParallel(n)}, lambda n: {"net": [n]}]
)
def test_strides_and_epsilon_of_pickled_modules_are_used(
    wrap: Callable[..., object], images: Tensor, save: Save
) -> None:
    net = make_net()
    checkpoint = load_checkpoint(save(wrap(net)))
    assert (checkpoint.spec.strides, checkpoint.spec.bn_eps) == (STRIDES, 1e-3)
    assert checkpoint.origins["strides"] == "the pickled modules"
    with torch.no_grad():
        assert torch.allclose(build(checkpoint)(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("act", "name"), [(nn.SiLU(), "silu"), (nn.LeakyReLU(0.2), "leaky_relu:0.2"), (nn.ReLU(), "relu")]
)
def test_activation_of_pickled_modules_is_used(act: nn.Module, name: str, save: Save) -> None:
    checkpoint = load_checkpoint(save(make_net(act)))
    assert str(checkpoint.spec.activation) == name
    assert checkpoint.origins["activation"] == "the pickled modules"


def test_option_goes_before_the_pickled_modules(save: Save) -> None:
    path = save(make_net(nn.SiLU()))
    assert str(load_checkpoint(path, structure=StructureOptions(activation="relu")).spec.activation) == "relu"


def test_state_dict_says_nothing_of_them(save: Save) -> None:
    checkpoint = load_checkpoint(save(make_net().state_dict()))
    assert (checkpoint.spec.strides, checkpoint.spec.bn_eps) == ((2, 2, 2, 2, 2), 1e-5)
    assert checkpoint.origins["strides"] == "assumed"


def test_blocks_of_the_helper_are_those_of_the_official_code() -> None:
    assert "stage1.0.rbr_dense.conv.weight" in Official().state_dict()
    assert OFFICIAL["dense"] == "rbr_dense"
