"""`fuse` on the blocks of other libraries, known by their parts and not by their classes."""

import pytest
import torch
from helpers.wide_statistics import randomize, relative
from torch import nn

from repvgg_deploy.errors import FusionError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.repvgg import FusedBlock, SqueezeExciteBlock


def conv_bn(cin: int, cout: int, kernel: int, stride: int, groups: int, names: tuple[str, str]) -> nn.Sequential:
    branch = nn.Sequential()
    branch.add_module(names[0], nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False))
    branch.add_module(names[1], nn.BatchNorm2d(cout))
    return branch


class Official(nn.Module):
    """Has the attributes of the official block."""

    def __init__(self, cin: int, cout: int, stride: int = 1, groups: int = 1, se: bool = False, post: bool = False):
        super().__init__()
        self.nonlinearity = nn.ReLU()
        self.se = SqueezeExciteBlock(cout, 2) if se else nn.Identity()
        self.post_se = SqueezeExciteBlock(cout, 2) if post else nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None
        self.rbr_dense = conv_bn(cin, cout, 3, stride, groups, ("conv", "bn"))
        self.rbr_1x1 = conv_bn(cin, cout, 1, stride, groups, ("conv", "bn"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            total = total + self.rbr_identity(x)
        return self.post_se(self.nonlinearity(self.se(total)))


class QaV2(nn.Module):
    """Has the attributes of QARepVGG's second block: bare 1×1 and identity, a BN after the sum."""

    def __init__(self, channels: int, se: bool = False):
        super().__init__()
        self.nonlinearity = nn.ReLU()
        self.se = SqueezeExciteBlock(channels, 2) if se else nn.Identity()
        self.rbr_dense = conv_bn(channels, channels, 3, 1, 1, ("conv", "bn"))
        self.rbr_1x1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.rbr_identity = nn.Identity()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.rbr_dense(x) + self.rbr_1x1(x) + self.rbr_identity(x)
        return self.nonlinearity(self.bn(self.se(total)))


class OpenMmlab(nn.Module):
    """Has the attributes of OpenMMLab's block."""

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        self.branch_norm = nn.BatchNorm2d(channels) if stride == 1 else None
        self.branch_3x3 = conv_bn(channels, channels, 3, stride, 1, ("conv", "norm"))
        self.branch_1x1 = conv_bn(channels, channels, 1, stride, 1, ("conv", "norm"))
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.branch_3x3(x) + self.branch_1x1(x)
        return self.act(total if self.branch_norm is None else total + self.branch_norm(x))


class Holocron(nn.Module):
    """Has the attributes of Holocron's block."""

    def __init__(self, cin: int, cout: int, stride: int = 1):
        super().__init__()
        branches = [conv_bn(cin, cout, k, stride, 1, ("0", "1")) for k in (3, 1)]
        self.branches = nn.ModuleList(branches + ([nn.BatchNorm2d(cin)] if stride == 1 and cin == cout else []))
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(sum(branch(x) for branch in self.branches))


BLOCKS = {
    "official": lambda: Official(4, 4),
    "official, stride 2": lambda: Official(4, 6, 2),
    "official, groups": lambda: Official(4, 4, 1, 2),
    "official, SE": lambda: Official(4, 4, se=True),
    "RepVGGplus": lambda: Official(4, 4, post=True),
    "QARepVGG V2": lambda: QaV2(4),
    "OpenMMLab": lambda: OpenMmlab(4),
    "OpenMMLab, stride 2": lambda: OpenMmlab(4, 2),
    "Holocron": lambda: Holocron(4, 4),
    "Holocron, stride 2": lambda: Holocron(4, 8, 2),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
def test_a_block_of_another_library_fuses_exactly(make) -> None:
    torch.manual_seed(0)
    block = randomize(make()).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    fused = fuse(block)
    assert isinstance(fused, FusedBlock)
    assert relative(fused(x), block(x)) <= 1e-12


def test_qarepvgg_with_squeeze_excite_is_refused() -> None:
    with pytest.raises(FusionError, match="squeeze-excite"):
        fuse(QaV2(4, se=True))


def test_a_branch_that_no_repvgg_has_is_not_lost_in_silence() -> None:
    block = QaV2(4)
    block.rbr_avg = nn.AvgPool2d(3, 1, 1)
    with pytest.raises(FusionError, match="rbr_avg"):
        fuse(block)


class Scaled(Official):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gamma = nn.Parameter(torch.full((1, 4, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gamma


class Residual(Official):
    """Has a skip connection around the whole block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x


class Concatenated(Holocron):
    """Looks like Holocron's block, and puts its branches side by side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(torch.cat([branch(x) for branch in self.branches], 1))


def hooked() -> nn.Module:
    block = Official(4, 4)
    block.register_forward_hook(lambda *arguments: arguments[-1] * 2)
    return block


@pytest.mark.parametrize(
    "make",
    [Scaled, lambda: Residual(4, 4), lambda: Concatenated(4, 4), hooked],
    ids=["parameter", "skip", "concatenation", "hook"],
)
def test_a_block_that_does_something_else_with_the_same_parts_is_refused(make) -> None:
    with pytest.raises(FusionError, match="does something else"):
        fuse(nn.Sequential(randomize(make())))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["repvgg_a0", "repvgg_b1g4", pytest.param("repvgg_d2se", marks=pytest.mark.exhaustive)]
)
def test_timms_nets_fuse(timm, name) -> None:
    torch.manual_seed(0)
    net = randomize(timm.create_model(name, num_classes=7)).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert relative(fuse(net)(x), net(x)) <= 1e-12


class SegmentationNet(nn.Module):
    """A RepVGG backbone with two outputs, a decoder of plain convolutions, one block shared between two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Official(3, 8, 2)
        self.body = nn.Sequential(Official(8, 8), Official(8, 16, 2), Holocron(16, 16))
        self.shared = OpenMmlab(16)
        self.decoder = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
        self.skip = nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.stem(x)
        high = self.shared(self.shared(self.body(low)))
        up = nn.functional.interpolate(self.decoder(high), size=low.shape[2:], mode="bilinear")
        return up + self.skip(low)


def test_a_segmentation_net_with_a_repvgg_backbone_fuses_and_the_rest_is_untouched() -> None:
    torch.manual_seed(0)
    net = randomize(SegmentationNet()).double()
    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    fused = fuse(net)
    assert isinstance(fused, SegmentationNet)
    assert sum(isinstance(module, FusedBlock) for module in fused.modules()) == 5
    assert isinstance(fused.decoder[1], nn.BatchNorm2d)
    assert all(torch.equal(fused.state_dict()[k], v) for k, v in net.state_dict().items() if k.startswith("decoder"))
    assert relative(fused(x), net(x)) <= 1e-12


def test_a_block_used_twice_stays_one_block() -> None:
    net = SegmentationNet()
    net.alias = net.shared
    fused = fuse(net.eval())
    assert fused.alias is fused.shared
