"""The start of quantization-aware training: the INT8 export's kernels and scales, put into trainable branches.

Dead inputs are removed and channels equalized, as for an export, and the branches of each block are changed so that
together they are exactly the kernel that the export would round. So training starts where calibration ends. A net in
deploy form gets a BN after each convolution, with the statistics that its output has on the images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg_deploy.fusion.fuse import equivalent_kernel_bias, fuse
from repvgg_deploy.nets.repvgg import ConvBranch, FusedBlock, RepVGG, TrainingBlock
from repvgg_deploy.nets.spec import ArchSpec, Branch
from repvgg_deploy.progress import SILENT, Progress
from repvgg_deploy.quantization.points import POOL, Images, fused_blocks, point_names, rebatch, walk
from repvgg_deploy.quantization.qat import LayerScales, QatOptions, QatScales, prepare_qat
from repvgg_deploy.quantization.quantize import begin_quantization, find_integers, prepare
from repvgg_deploy.quantization.recipe import Recipe

# A BN that scales by less than this passes nothing on, so its kernel cannot be corrected through it.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class StartingPoint:
    """`student` is trained; `teacher` is the float net in deploy form whose outputs it learns.

    Both have the same scaling of channels, so that their stages' outputs can be compared.
    """

    student: nn.Module
    teacher: RepVGG


def start_training(
    net: RepVGG, images: Images, recipe: Recipe, options: QatOptions, progress: Progress = SILENT
) -> StartingPoint:
    """The student and the teacher for `net`, in training or deploy form, calibrated on `images`.

    The student computes what an export by `recipe` to these integers computes; `QatOptions()` are those of INT8.
    """
    state = prepare(begin_quantization(_fused(net), images, recipe, grid=options, progress=progress))
    teacher = state.net
    student = copy.deepcopy(net) if net.spec.form == "train" else _add_norms(teacher, images)
    if net.spec.form == "train":
        _rescale(student, state.factors)
    result = find_integers(state, images, progress=progress).integers
    _set_kernels(student, teacher, {name: (layer.dequantized(), layer.bias) for name, layer in result.layers.items()})
    scales = {name: LayerScales(layer.weight_scale, layer.input_scale) for name, layer in result.layers.items()}
    return StartingPoint(prepare_qat(student, QatScales(scales, result.pool_scale), options), teacher)


def empty_start(net: RepVGG, options: QatOptions) -> StartingPoint:
    """What `start_training` gives for `net`, with other values: those of a saved state are loaded into it."""
    with torch.device("meta"):
        teacher = RepVGG(net.spec.fused())
        student = RepVGG(net.spec if net.spec.form == "train" else _spec_with_norms(net.spec))
    student, teacher = student.to_empty(device="cpu").eval(), teacher.to_empty(device="cpu").eval()
    widths = {name: block.spec.out_channels for name, block in _training_blocks(student)}
    widths["classifier"] = net.spec.classes
    layers = {name: LayerScales(torch.ones(width), 1.0) for name, width in widths.items()}
    return StartingPoint(prepare_qat(student, QatScales(layers, 1.0), options), teacher.requires_grad_(False))


def _training_blocks(net: RepVGG) -> list[tuple[str, TrainingBlock]]:
    return [(name, cast(TrainingBlock, block)) for name, block in net.named_blocks()]


def _spec_with_norms(spec: ArchSpec) -> ArchSpec:
    """The architecture of a deploy form with a BN after each convolution."""
    stages = tuple(tuple(replace(block, branches=(Branch(3),)) for block in stage) for stage in spec.stages)
    return replace(spec, stages=stages)


def _fused(net: RepVGG) -> RepVGG:
    if net.spec.form == "train":
        net = fuse(net, torch.float32)
    return copy.deepcopy(net).float().eval().requires_grad_(False)


@torch.no_grad()
def _rescale(net: RepVGG, factors: Mapping[str, Tensor]) -> None:
    """Divide the channels of each point by their factors, in the branches; their BN statistics stay true."""
    if not factors:
        return
    names = [*point_names(net)[1:-2], POOL]
    blocks = [cast(TrainingBlock, block) for block in net.blocks()]
    for index, block in enumerate(blocks):
        if index:
            _scale_inputs(block, factors[names[index - 1]])
        out = factors[names[index]]
        norms = [block.bn] if isinstance(block.bn, _BatchNorm) else _branch_norms(block)
        for norm in norms:
            norm.weight.div_(out)
            norm.bias.div_(out)


def _scale_inputs(block: TrainingBlock, factor: Tensor) -> None:
    """Let `block` read channels that were divided by `factor`."""
    for branch in _branches(block):
        if isinstance(branch.conv, nn.Conv2d):
            conv = branch.conv
            columns = factor.reshape(conv.groups, -1).repeat_interleave(conv.out_channels // conv.groups, 0)
            conv.weight.copy_(conv.weight.double() * columns[:, :, None, None])
        elif isinstance(branch.bn, _BatchNorm):
            norm = branch.bn
            assert norm.running_mean is not None
            assert norm.running_var is not None
            gain = norm.weight.double() * factor / (norm.running_var.double() + norm.eps).sqrt()
            norm.running_mean.copy_(norm.running_mean.double() / factor)
            norm.running_var.copy_(norm.running_var.double() / factor.square())
            norm.weight.copy_(gain * (norm.running_var.double() + norm.eps).sqrt())


@torch.no_grad()
def _set_kernels(student: RepVGG, teacher: RepVGG, targets: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Change the branches of `student` so that its equivalent kernels and biases are the targets."""
    fused = dict(fused_blocks(teacher))
    for name, module in student.named_blocks():
        block = cast(TrainingBlock, module)
        weight, bias = targets[name]
        _drop_removed_identities(block, fused[name].conv.weight)
        _match(block, weight.double(), bias.double())
        block.se_before.load_state_dict(fused[name].se_before.state_dict())
        block.se_after.load_state_dict(fused[name].se_after.state_dict())
    weight, bias = targets["classifier"]
    student.classifier.weight.copy_(weight)
    student.classifier.bias.copy_(bias)


def _drop_removed_identities(block: TrainingBlock, weight: Tensor) -> None:
    """Switch off the identity of channels whose kernel entry was removed: γ/σ is enormous there, and would be noise."""
    identity = block._modules.get("branch_identity")
    if not isinstance(identity, ConvBranch) or not isinstance(identity.bn, _BatchNorm):
        return
    norm = identity.bn
    assert norm.running_mean is not None
    assert norm.running_var is not None
    out = torch.arange(len(weight))
    center = weight.shape[2] // 2
    gone = weight[out, out % weight.shape[1], center, center] == 0
    norm.weight[gone] = 0.0
    norm.bias[gone] = 0.0
    norm.running_mean[gone] = 0.0
    norm.running_var[gone] = 1.0


def _match(block: TrainingBlock, weight: Tensor, bias: Tensor) -> None:
    """Put what the equivalent kernel and bias lack into the largest kernel and its BN's shift."""
    branch = max((b for b in _branches(block) if isinstance(b.conv, nn.Conv2d)), key=_kernel_size)
    conv = cast(nn.Conv2d, branch.conv)
    norm = branch.bn if isinstance(branch.bn, _BatchNorm) else None
    _revive(conv, norm)
    after = block.bn if isinstance(block.bn, _BatchNorm) else None
    gain = _gain(norm, weight) * _gain(after, weight)
    last = after if after is not None else norm
    # Twice: the first correction may be large, and its rounding to float32 with it.
    for _ in range(2):
        kernel, shift = equivalent_kernel_bias(block, torch.float64)
        conv.weight.add_(((weight - kernel) / gain[:, None, None, None]).to(conv.weight.dtype))
        assert last is not None
        last.bias.add_((bias - equivalent_kernel_bias(block, torch.float64)[1]).to(last.bias.dtype))
        del shift


def _revive(conv: nn.Conv2d, norm: _BatchNorm | None) -> None:
    """Give a BN that scales by (nearly) 0 a gain of 1 after a kernel of zeros, which can then be corrected."""
    if norm is None:
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dead = _gain(norm, conv.weight).abs() < _SMALLEST
    conv.weight[dead] = 0.0
    norm.running_mean[dead] = 0.0
    norm.weight[dead] = (norm.running_var[dead] + norm.eps).sqrt()


def _gain(norm: _BatchNorm | None, like: Tensor) -> Tensor:
    """What a BN multiplies each channel by, in float64; 1 where there is none."""
    if norm is None:
        return torch.ones(len(like), dtype=torch.float64)
    assert norm.running_var is not None
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()


@torch.no_grad()
def _add_norms(teacher: RepVGG, images: Images) -> RepVGG:
    """A net with a BN after each convolution of `teacher`, with the statistics of its output on `images`."""
    net = RepVGG(_spec_with_norms(teacher.spec)).eval().requires_grad_(False)
    moments = _output_moments(teacher, images)
    for (name, fused), module in zip(fused_blocks(teacher), net.blocks(), strict=True):
        block = cast(TrainingBlock, module)
        branch = cast(ConvBranch, block.get_submodule("branch_3x3"))
        norm = cast(_BatchNorm, branch.bn)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = moments[name]
        cast(nn.Conv2d, branch.conv).weight.copy_(fused.conv.weight)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(cast(Tensor, fused.conv.bias) + mean)
    return net


def _output_moments(net: RepVGG, images: Images) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each convolution's output without its bias, over all images."""
    sums: dict[str, list[Tensor]] = {}
    count = 0
    blocks = dict(fused_blocks(net))
    for batch in rebatch(images, net.classifier.weight.device):
        count += len(batch)
        for name, x in walk(net, batch):
            if name not in blocks:
                continue
            out = _without_bias(blocks[name])(x).double()
            parts = [out.mean((2, 3)).sum(0), out.square().mean((2, 3)).sum(0)]
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts
    return {n: (s / count, (q / count - (s / count).square()).clamp_min(0)) for n, (s, q) in sums.items()}


def _without_bias(block: FusedBlock) -> Callable[[Tensor], Tensor]:
    bias = cast(Tensor, block.conv.bias)
    return lambda x: cast(Tensor, block.conv(x)) - bias[:, None, None]


def _branches(block: TrainingBlock) -> list[ConvBranch]:
    return [module for module in block.children() if isinstance(module, ConvBranch)]


def _branch_norms(block: TrainingBlock) -> list[_BatchNorm]:
    return [branch.bn for branch in _branches(block) if isinstance(branch.bn, _BatchNorm)]


def _kernel_size(branch: ConvBranch) -> int:
    return int(cast(nn.Conv2d, branch.conv).kernel_size[0])
