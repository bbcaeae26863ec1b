"""`fuse` on blocks whose names it does not know: any sum of branches of one input."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.foreign_blocks import ScaledBranches, SumOfBranches, YoloRepConv, conv_norm, freeze_norms
from helpers.small_nets import make_net
from helpers.wide_statistics import randomize, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg_deploy.errors import FusionError
from repvgg_deploy.fusion.fuse import equivalent_kernel_bias, fuse
from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, SqueezeExciteBlock


def images(channels: int, size: int = 9) -> Tensor:
    return torch.randn(2, channels, size, size + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@st.composite
def blocks(draw) -> tuple[SumOfBranches, int]:
    kernels = tuple(draw(st.lists(st.sampled_from([1, 3, 3, 5, 7]), min_size=1, max_size=4)))
    # Kernels of several sizes look at the same pixels only without dilation.
    dilation = draw(st.sampled_from([1, 2, 4])) if len({k for k in kernels if k > 1}) == 1 else 1
    groups = draw(st.sampled_from([1, 1, 2, 6]))
    cin = 6 if groups == 6 else groups * draw(st.integers(1, 3))
    cout = draw(st.sampled_from([cin, 2 * cin]))
    stride = draw(st.sampled_from([1, 2]))
    scale = draw(st.booleans()) or (len(kernels) == 1 and (cin != cout or stride == 2))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return SumOfBranches(cin, cout, kernels, stride, dilation, groups, scale), cin


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(made=blocks(), seed=st.integers(0, 2**16), frozen=st.booleans())
def test_any_sum_of_branches_is_one_convolution_in_float64(made, seed, frozen) -> None:
    block, channels = made
    block = randomize(freeze_norms(block) if frozen else block, seed).double()
    fused = fuse(block)
    assert isinstance(fused, FusedBlock)
    assert isinstance(fused.act, nn.ReLU)
    assert relative(fused(images(channels)), block(images(channels))) <= 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda: YoloRepConv(4, 4),
        lambda: YoloRepConv(4, 6, nn.Identity()),
        lambda: ScaledBranches(4),
        lambda: SumOfBranches(4, 4, act=nn.Sequential(SqueezeExciteBlock(4, 2), nn.Hardswish())),
        lambda: SumOfBranches(8, 8, (9, 5), groups=8, scale=False),
    ],
    ids=["YOLOv7", "YOLOv7 without activation", "factors", "squeeze-excite", "large and small kernel"],
)
def test_blocks_of_other_designs_fuse_exactly(make) -> None:
    torch.manual_seed(0)
    block = randomize(make()).double()
    channels = 8 if isinstance(block, SumOfBranches) and block.skip and block.skip.num_features == 8 else 4
    fused = fuse(nn.Sequential(block))[0]
    assert isinstance(fused, FusedBlock)
    assert relative(fused(images(channels)), block(images(channels))) <= 1e-12


@pytest.mark.slow
def test_timms_mobileone_fuses_whole(timm) -> None:
    torch.manual_seed(0)
    net = randomize(timm.create_model("mobileone_s0", num_classes=7)).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    fused = fuse(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.no_grad():
        assert relative(fused(x), net(x)) <= 1e-12


def test_what_a_net_reads_of_its_layers_is_still_there() -> None:
    fused = fuse(nn.Sequential(randomize(YoloRepConv(4, 4))))
    assert (fused[0].f, fused[0].i) == (-1, 7)


class Bottleneck(nn.Module):
    """A residual block is no sum of affine branches: an activation stands between its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = conv_norm(4, 4, 3), conv_norm(4, 4, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))) + x)


@pytest.mark.parametrize("module", [Bottleneck(), conv_norm(4, 4, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())])
def test_other_modules_are_no_blocks(module) -> None:
    with pytest.raises(FusionError, match="no RepVGG block"):
        fuse(module)
    with pytest.raises(FusionError, match="is not a RepVGG block"):
        equivalent_kernel_bias(module)


def test_residual_blocks_beside_repvgg_blocks_stay_as_they_are() -> None:
    net = nn.Sequential(randomize(SumOfBranches(4, 4)), randomize(Bottleneck())).double()
    fused = fuse(net)
    assert isinstance(fused[0], FusedBlock)
    assert isinstance(fused[1], Bottleneck)
    assert relative(fused(images(4)), net(images(4))) <= 1e-12


def test_branches_that_look_at_other_pixels_are_refused_by_name() -> None:
    block = SumOfBranches(4, 4, (3, 3))
    block.many[1][0] = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False)
    with pytest.raises(FusionError, match=r"block 1: its branches do not look at the same pixels"):
        fuse(nn.Sequential(nn.Identity(), block))


def test_a_hook_that_changes_a_block_is_not_lost_in_silence() -> None:
    block = randomize(SumOfBranches(4, 4))
    block.register_forward_hook(lambda *arguments: arguments[-1] * 2)
    with pytest.raises(FusionError, match="does something else"):
        fuse(nn.Sequential(block))


def test_synchronized_norms_fuse_as_plain_ones_do() -> None:
    block = randomize(YoloRepConv(4, 4)).double()
    expected = fuse(nn.Sequential(block))(images(4))
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(block))
    assert torch.equal(fuse(synchronized)(images(4)), expected)


@pytest.mark.slow
def test_wrappers_of_training_are_left_out(net) -> None:
    expected = fuse(net)
    inside = nn.Sequential(torch.compile(net.stages[1][0], backend="eager"))
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        fused = fuse(wrapped)
        assert isinstance(fused, RepVGG)
        assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), expected.parameters(), strict=True))
    assert isinstance(fuse(inside)[0], FusedBlock)


def test_distributed_wrappers_are_left_out(net, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(net.requires_grad_(True))
            assert isinstance(fuse(wrapped), RepVGG)
        finally:
            torch.distributed.destroy_process_group()


def test_on_the_meta_device_the_form_is_fused_without_values() -> None:
    with torch.device("meta"):
        net = nn.Sequential(YoloRepConv(4, 4), SumOfBranches(4, 8, (5, 5), 2))
    fused = fuse(net)
    assert all(parameter.is_meta for parameter in fused.parameters())
    assert fused[1].conv.weight.shape == (8, 4, 5, 5)


def test_a_net_in_training_mode_is_fused_as_in_evaluation_and_stays_in_its_mode() -> None:
    net = nn.Sequential(randomize(SumOfBranches(4, 4))).double()
    expected = net(images(4))
    fused = fuse(net.train())
    assert net.training
    assert fused.training
    assert relative(fused(images(4)), expected) <= 1e-12


def test_the_gradient_reaches_every_branch_of_a_traced_block() -> None:
    block = randomize(SumOfBranches(3, 3, (3, 5)))
    kernel, bias = equivalent_kernel_bias(block)
    (kernel.square().sum() + bias.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.slow
def test_nets_run_in_other_threads_while_one_is_traced_and_so_may_be_tracing() -> None:
    """torch replaces `nn.Module.__call__` for the whole process while it traces."""
    call = nn.Module.__call__
    net = make_net()
    images = torch.randn(1, 3, 32, 32)
    expected = net(images)
    stop = threading.Event()

    def run() -> int:
        runs = 0
        while not stop.is_set():
            assert torch.equal(net(images), expected)
            runs += 1
        return runs

    with ThreadPoolExecutor(3) as pool:
        runner = pool.submit(run)
        wrapped = nn.Sequential(net.stages)
        fused = [pool.submit(fuse, wrapped) for _ in range(8)]
        results = [future.result() for future in fused]
        stop.set()
        assert runner.result() > 0
    assert len({tuple(name for name, _ in result.named_parameters()) for result in results}) == 1
    assert nn.Module.__call__ is call
