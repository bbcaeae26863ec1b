"""Draw the figures of README and docs: `python docs/_site/make_figures.py [FOLDER]`, docs/figures by default.

The numbers are those of the demo model in models/; nothing is drawn by hand. `bench/int8.py mixed` draws int8_mixed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from repvgg_deploy import build, equivalent_kernel_bias, fuse, load_checkpoint
from repvgg_deploy.benchmark.report.plots import COLOURS, STYLE
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.images.synthetic import draw_images
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization import Recipe
from repvgg_deploy.quantization.equalize import equalize
from repvgg_deploy.quantization.state import QuantizationState
from repvgg_deploy.quantization.statistics import CalibrationStatistics, collect_statistics

FIGURES = Path(__file__).resolve().parents[1] / "figures"
BLUE, ORANGE, GREEN = COLOURS[:3]
INK, PALE = "#222222", "#eef3f8"
BLOCK = 2
"""The block that is looked at: one with an identity branch."""


def main(folder: Path = FIGURES) -> None:
    """Write every figure as an SVG that is the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    net = build(load_checkpoint(data_folder("models") / "demo.safetensors"))
    fused = fuse(net, torch.float32)
    assert isinstance(fused, RepVGG)
    figures = {
        "architecture": draw_architecture(),
        "fusion": draw_fusion(net),
        "int8_weights": draw_weights(net),
        "int8_equalization": draw_equalization(fused.eval().requires_grad_(False)),
        "int8_pairs": draw_pairs(),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def draw_architecture() -> Figure:
    """What goes in, what comes out, and what is checked between."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 3.6))
    axes.axis("off")
    stages = [
        ("checkpoint", "official, timm, OpenMMLab,\nHolocron, QARepVGG, …"),
        ("training form", "a torch module, read\nfrom the tensors alone"),
        ("fused net", "one 3×3 convolution\nper block"),
        ("ONNX graph", "fp32, fp16, or\nexplicit INT8 Q/DQ"),
        ("engine", "TensorRT or\nTensorRT-RTX"),
    ]
    steps = ["checkpoints", "fusion", "graphs,\nquantization", "engine"]
    for index, (title, text) in enumerate(stages):
        _draw_box(axes, 0.05 + index * 2.02, 1.85, 1.55, 1.1, title, text)
    for index, step in enumerate(steps):
        start = 1.6 + index * 2.02
        _draw_arrow(axes, (start, 2.4), (start + 0.47, 2.4), INK)
        axes.text(start + 0.235, 3.02, step, ha="center", va="bottom", fontsize=8, color=BLUE)
    for index, text in enumerate(
        ("top class and logits agree", "logits agree in ONNX Runtime", "outputs agree on a GPU")
    ):
        left = 2.85 + index * 2.02
        axes.annotate("", (left + 2.02, 1.8), (left, 1.8),
                      arrowprops={"arrowstyle": "<->", "color": GREEN, "connectionstyle": "arc3,rad=0.35"})  # fmt: skip
        axes.text(left + 1.01, 1.22, text, ha="center", va="top", fontsize=8, color=GREEN)
    axes.text(5, 0.62, "each stage is compared with the one before on real inputs; files appear only when all agree",
              ha="center", fontsize=9, color=INK)  # fmt: skip
    axes.text(5, 0.22, "eval, verify and bench run any of these forms through one Runner interface",
              ha="center", fontsize=9, color=INK)  # fmt: skip
    return figure


def _draw_box(axes: Axes, left: float, bottom: float, width: float, height: float, title: str, text: str) -> None:
    style = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=PALE, ec=BLUE)
    axes.add_patch(style)
    center = left + width / 2
    axes.text(center, bottom + height * 0.72, title, ha="center", va="center", fontsize=10, weight="bold", color=INK)
    axes.text(center, bottom + height * 0.32, text, ha="center", va="center", fontsize=7.5, color=INK)


def _draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour))


def branch_kernels(block: Any) -> dict[str, torch.Tensor]:
    """The three branches of a block as 3×3 kernels (O, I, 3, 3), their BNs folded in."""
    wide = block.branch_3x3.conv.weight.double()
    found = {"3×3 branch": wide * _slope(block.branch_3x3.bn)}
    found["1×1 branch"] = torch.nn.functional.pad(
        block.branch_1x1.conv.weight.double() * _slope(block.branch_1x1.bn), [1] * 4
    )
    identity = torch.zeros_like(wide)
    identity[range(len(wide)), range(len(wide)), 1, 1] = 1
    found["identity branch"] = identity * _slope(block.branch_identity.bn)
    return {name: kernel.detach() for name, kernel in found.items()}


def _slope(norm: Any) -> torch.Tensor:
    """γ/σ of each filter, shaped for a kernel."""
    slope: torch.Tensor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return slope.reshape(-1, 1, 1, 1)


def draw_fusion(net: RepVGG) -> Figure:
    """One kernel plane of each branch, and their sum, which is the plane that the tool computes."""
    block = list(net.blocks())[BLOCK]
    kernels = branch_kernels(block)
    total = sum(kernels.values())
    fused, _ = equivalent_kernel_bias(block)
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total, fused.detach())
    # The filter whose identity counts most.
    channel = int(kernels["identity branch"].amax((1, 2, 3)).argmax())
    planes = {**kernels, "fused kernel": fused.detach()}
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    limit = float(fused[channel, channel].abs().max())
    for axes, (name, kernel), sign in zip(figure.subplots(1, 4), planes.items(), ("+", "+", "=", ""), strict=True):
        plane = kernel[channel, channel].numpy()
        axes.imshow(plane, cmap="RdBu_r", vmin=-limit, vmax=limit)
        for (row, column), value in np.ndenumerate(plane):
            colour = "white" if abs(value) > 0.6 * limit else INK
            axes.text(column, row, f"{value:.2f}" if value else "0", ha="center", va="center", fontsize=9, color=colour)
        axes.set(title=name, xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.text(1.14, 0.5, sign, transform=axes.transAxes, ha="center", va="center", fontsize=16)
    return figure


def draw_weights(net: RepVGG) -> Figure:
    """How far the largest weight of a filter stands above its usual one, in the 3×3 branch and in the fused kernel."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    blocks = [block for block in net.blocks() if hasattr(block, "branch_identity")]
    branch = torch.cat([_peaks(branch_kernels(block)["3×3 branch"]) for block in blocks])
    fused = torch.cat([_peaks(equivalent_kernel_bias(block)[0].detach()) for block in blocks])
    bins: list[float] = np.linspace(0, float(max(branch.max(), fused.max())), 40).tolist()
    axes.hist(branch.numpy(), bins, color=BLUE, alpha=0.75, label="3×3 branch")
    axes.hist(fused.numpy(), bins, color=ORANGE, alpha=0.75, label="fused kernel")
    axes.set(xlabel="largest weight of a filter / root mean square of its weights", ylabel="filters")
    axes.legend()
    return figure


def _peaks(kernel: torch.Tensor) -> torch.Tensor:
    rows = kernel.flatten(1)
    return rows.abs().amax(1) / rows.square().mean(1).sqrt()


def draw_equalization(fused: RepVGG) -> Figure:
    """The usual largest activation of each channel before and after equalization, in codes of the scale they share."""
    pixels, _ = draw_images(128, 1)
    images = normalize(pixels, find_card("demo").preprocessing)
    before = collect_statistics(fused, [images])
    equal = equalize(QuantizationState(fused, before, Recipe("the figure's", equalize=0.5)))
    after = collect_statistics(equal.net, [images])
    name = list(before.points)[BLOCK + 1]
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, statistics, title in zip(
        figure.subplots(1, 2), (before, after), ("before", "after equalization"), strict=True
    ):
        _draw_ranges(axes, statistics, name)
        axes.set(title=title, xlabel="channel, sorted", ylabel="codes of 127 that it uses")
    return figure


def _draw_ranges(axes: Axes, statistics: CalibrationStatistics, name: str) -> None:
    usual = np.sort(np.asarray(statistics.points[name].usual))[::-1]
    codes = usual / usual.max() * 127
    axes.bar(np.arange(len(codes)), codes, color=BLUE, width=1.0)
    axes.axhline(float(np.median(codes)), color=ORANGE, linestyle="--", label=f"median {np.median(codes):.0f}")
    axes.legend()


def draw_pairs() -> Figure:
    """Which pairs of weights can overflow 16 bits with codes up to 255, and which are allowed."""
    first, second = np.meshgrid(np.arange(-127, 128), np.arange(-127, 128))
    # Codes are 0 to 255, so each sign's weights add up by themselves: the worst input is 255 where they have that sign.
    positive, negative = (255 * (np.clip(s * first, 0, None) + np.clip(s * second, 0, None)) for s in (1, -1))
    overflows = (positive > 32767) | (negative > 32768)
    allowed = (positive <= 255 * 128) & (negative <= 255 * 128)
    assert not (overflows & allowed).any()
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    shades = mpl.colors.ListedColormap(["#bcd7ec", "#f4c7a8"])
    axes.imshow(overflows, origin="lower", extent=(-127.5, 127.5, -127.5, 127.5), cmap=shades)
    axes.grid(visible=False)
    axes.set(xlabel="weight of one column", ylabel="weight of its neighbor")
    axes.text(88, 88, "can\noverflow", ha="center", va="center", color=INK)
    axes.text(-88, -88, "can\noverflow", ha="center", va="center", color=INK)
    axes.text(0, 0, "allowed", ha="center", va="center", color=INK)
    return figure


if __name__ == "__main__":
    with mpl.rc_context(STYLE):
        main(*map(Path, sys.argv[1:2]))
