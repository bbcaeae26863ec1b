"""The algebra of fusing, for every block that can exist."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.float32_sums import error_of_float32_sums
from helpers.small_nets import BARE, make_net
from helpers.wide_statistics import narrow, randomize, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repvgg_deploy.errors import FusionError
from repvgg_deploy.fusion.fuse import equivalent_kernel_bias, fuse, fuse_in_place
from repvgg_deploy.nets.cards import load_cards
from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG, TrainingBlock
from repvgg_deploy.nets.spec import IDENTITY, BlockSpec, Branch, SqueezeExcite, training_branches
from repvgg_deploy.verification.reference import run_in_float64


@st.composite
def block_specs(draw) -> BlockSpec:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    cin = groups * draw(st.integers(1, 4))
    cout = draw(st.sampled_from([cin, groups * draw(st.integers(1, 4))]))
    block = BlockSpec(cin, cout, draw(st.sampled_from([1, 2])), groups)
    kept = [b for b in training_branches(block) if b.kernel == 3 or draw(st.booleans())]
    branches = tuple(Branch(b.kernel, draw(st.booleans())) for b in kept)
    se = draw(st.sampled_from([None, SqueezeExcite(2, "before"), SqueezeExcite(3, "after")]))
    after = draw(st.booleans()) and (se is None or se.position == "after")
    return replace(block, branches=branches, norm_after_sum=after, squeeze_excite=se)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(spec=block_specs(), seed=st.integers(0, 2**16), eps=st.sampled_from([1e-5, 1e-3, 1e-12]), odd=st.booleans())
def test_a_fused_block_equals_its_training_form_in_float64(spec, seed, eps, odd) -> None:
    torch.manual_seed(seed)
    block = randomize(TrainingBlock(spec, eps), seed).double()
    x = torch.randn(2, spec.in_channels, 7 if odd else 8, 6, dtype=torch.float64)
    assert relative(fuse(block)(x), block(x)) <= 1e-12


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    variance=st.floats(1e-14, 1e6),
    gamma=st.floats(-1e3, 1e3).filter(lambda g: abs(g) > 1e-3),
    eps=st.sampled_from([1e-5, 1e-3]),
    seed=st.integers(0, 99),
)
def test_extreme_statistics_keep_the_algebra_exact(variance, gamma, eps, seed) -> None:
    torch.manual_seed(seed)
    block = randomize(TrainingBlock(BlockSpec(4, 4, 1), eps), seed).double()
    norm = block.branch_identity.bn
    norm.running_var[0], norm.weight.data[0] = variance, gamma
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    assert relative(fuse(block)(x), block(x)) <= 1e-12


def test_the_identity_of_a_grouped_block_stays_inside_its_group() -> None:
    block = TrainingBlock(replace(BlockSpec(6, 6, 1, 2), branches=(Branch(3, False), Branch(IDENTITY, False))))
    nn.init.zeros_(block.branch_3x3.conv.weight)
    kernel, bias = equivalent_kernel_bias(block)
    assert kernel.shape == (6, 3, 3, 3)
    assert [(i, j) for i, j in kernel[:, :, 1, 1].nonzero().tolist()] == [(i, i % 3) for i in range(6)]
    assert kernel.sum() == 6
    assert bias.abs().sum() == 0


def test_zero_variance_channels_fuse_exactly() -> None:
    block = randomize(TrainingBlock(BlockSpec(4, 4, 1))).double()
    for norm in (block.branch_3x3.bn, block.branch_identity.bn):
        norm.running_var.zero_()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert relative(fuse(block)(x), block(x)) <= 1e-12


def test_equivalent_kernel_and_bias_are_differentiable() -> None:
    block = randomize(TrainingBlock(replace(BlockSpec(2, 2, 1), norm_after_sum=True))).double()
    names = [name for name, _ in block.named_parameters()]

    def as_function(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for name, value in zip(names, values, strict=True):
            module, leaf = block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            module._parameters.pop(leaf, None)
            setattr(module, leaf, value)
        return equivalent_kernel_bias(block)

    values = [p.detach().clone().requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(as_function, values)


def test_the_gradient_reaches_every_branch_through_the_equivalent_kernel() -> None:
    block = randomize(TrainingBlock(BlockSpec(3, 3, 1)))
    kernel, bias = equivalent_kernel_bias(block)
    (kernel.square().sum() + bias.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_fusing_leaves_the_original_as_it_was() -> None:
    net = randomize(RepVGG(narrow("A0").spec(5)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fused = fuse(net)
    fused.stages[0][0].conv.weight.data.zero_()
    fused.classifier.weight.data.zero_()
    assert net.spec.form == "train"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(load_cards()))
def test_every_architecture_fuses_exactly_in_float64(name) -> None:
    torch.manual_seed(0)
    net = randomize(RepVGG(narrow(name).spec(5))).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fused = fuse(net)
    assert fused.spec.form == "deploy"
    assert all(isinstance(block, FusedBlock) for block in fused.blocks())
    assert relative(fused(x), net(x)) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", list(load_cards()))
def test_fused_weights_are_those_of_float64_rounded_once(name) -> None:
    net = randomize(RepVGG(narrow(name).spec(5)))
    exact = fuse(copy.deepcopy(net).double())
    for (key, weight), wide in zip(fuse(net).named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(weight, wide.float()), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "divisor"),
    [*((name, 8) for name in load_cards()), ("A0", 1), pytest.param("B1g4", 1, marks=pytest.mark.exhaustive)],
)
@torch.no_grad()
def test_float32_is_as_near_to_the_reference_as_the_lengths_of_its_sums_allow(name, divisor) -> None:
    torch.manual_seed(1)
    net = randomize(RepVGG(narrow(name, divisor).spec(50)))
    x = torch.randn(2, 3, 32, 32)
    reference = torch.from_numpy(run_in_float64(net, x.numpy())["logits"])
    assert relative(fuse(net)(x), reference) <= 2 * error_of_float32_sums(fuse(net, torch.float64), x)


def test_a_net_is_fused_whole_or_not_at_all() -> None:
    net = RepVGG(narrow("A0").spec(5)).eval()
    net.stages[1][1].branch_identity.bn = nn.InstanceNorm2d(6)
    with pytest.raises(FusionError, match="branch_identity"):
        fuse(net)


def test_bare_identity_branches_are_fused_as_well() -> None:
    spec = narrow("A0").spec(5)
    stages = tuple(
        tuple(replace(b, branches=tuple(Branch(r.kernel, r.kernel == 3) for r in b.branches)) for b in stage)
        for stage in spec.stages
    )
    fused = fuse(randomize(RepVGG(replace(spec, stages=stages))))
    assert all(isinstance(block, FusedBlock) for block in fused.blocks())


def test_a_fused_net_fuses_to_itself() -> None:
    fused = fuse(randomize(RepVGG(narrow("A0").spec(5))))
    again = fuse(fused)
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), again.parameters(), strict=True))


def test_a_module_without_repvgg_blocks_is_refused() -> None:
    with pytest.raises(FusionError, match="no RepVGG block"):
        fuse(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))


def test_a_bn_without_running_statistics_is_refused() -> None:
    block = TrainingBlock(BlockSpec(4, 4, 1))
    block.branch_1x1.bn = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(FusionError, match="running statistics"):
        fuse(block)


def test_a_shifted_branch_is_refused() -> None:
    block = TrainingBlock(BlockSpec(4, 4, 2))
    block.branch_1x1.conv = nn.Conv2d(4, 4, 1, stride=2, padding=1)
    with pytest.raises(FusionError, match="same pixels"):
        fuse(block)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        nn.Conv2d(4, 4, 5, padding=4, dilation=2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(4, 4, 2),
    ],
    ids=["not square", "another dilation", "more channels", "even"],
)
def test_a_branch_that_no_single_kernel_can_take_in_is_refused(conv) -> None:
    block = TrainingBlock(BlockSpec(4, 4, 1))
    block.branch_1x1.conv = conv
    with pytest.raises(FusionError, match="same pixels"):
        fuse(block)


def test_a_dilated_block_fuses() -> None:
    block = randomize(TrainingBlock(BlockSpec(4, 4, 1))).double()
    dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False).double()
    block.branch_3x3.conv = dilated
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert relative(fuse(block)(x), block(x)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_fused_weights_have_the_type_asked_for(dtype) -> None:
    net = randomize(RepVGG(narrow("A0").spec(5)))
    assert {p.dtype for p in fuse(net, dtype).parameters()} == {dtype}


KINDS = {
    "plain": {},
    "groups": {"groups": 2},
    "squeeze-excite": {"squeeze_excite": SqueezeExcite(2, "before")},
    "BN after the sum": {"branches": BARE, "norm_after_sum": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_fusing_in_place_gives_the_same_net_in_the_memory_of_the_kernels(kind) -> None:
    net = make_net(**KINDS[kind])
    expected = fuse(net, torch.float32).state_dict()
    places = [block.branch_3x3.conv.weight.data_ptr() for block in net.blocks()]
    fused = fuse_in_place(net)
    assert fused.spec.form == "deploy"
    assert [block.conv.weight.data_ptr() for block in fused.blocks()] == places
    found = fused.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("tied", ["kernel", "statistics inside a kernel", "transposed kernel"])
def test_fusing_in_place_overwrites_nothing_that_is_shared(tied) -> None:
    net = make_net()
    first, second = net.stages[3][1], net.stages[3][2]
    kernel = first.branch_3x3.conv.weight
    if tied == "kernel":
        second.branch_3x3.conv.weight = kernel
    elif tied == "statistics inside a kernel":
        second.branch_3x3.bn.bias = nn.Parameter(kernel.detach().flatten()[: second.spec.out_channels], False)
    else:
        kernel.data = kernel.detach().transpose(0, 1).contiguous().transpose(0, 1)
    expected = fuse(net, torch.float32).state_dict()
    found = fuse_in_place(net).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_fusing_in_place_leaves_a_deploy_form_as_it_is_and_makes_float64_float32() -> None:
    fused = fuse(make_net(), torch.float32)
    before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in fuse_in_place(fused).state_dict().items())
    wide = make_net().double()
    expected = fuse(wide, torch.float32).state_dict()
    found = fuse_in_place(wide).state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
