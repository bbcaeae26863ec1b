"""Table of whole networks: blocks fused, error of each output per precision in ONNX Runtime, engines built.

    python bench/whole_networks.py [NAME…] > table.md

The demo net and the segmentation net are trained; the others have random weights and batch norms that have seen drawn
pictures. `onnxscript` must be installed, and timm for its nets.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg_deploy import build, export_module, load_checkpoint
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.images.synthetic import draw_images
from repvgg_deploy.workflows.export_result import ModuleExportResult

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
SIZE, CALIBRATION, RECIPE = 64, 128, "fast"
Precision = Literal["fp32", "fp16", "int8"]


def pictures(count: int, seed: int) -> Tensor:
    """Drawn pictures (N, 3, SIZE, SIZE), about normalized."""
    pixels, _ = draw_images(count, seed=seed, size=SIZE)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(0.45).div(0.25)


class Detector(nn.Module):
    """Features of three sizes, mixed upwards by a block that all sizes share; three outputs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        block = importlib.import_module("segmentation").Block
        self.stages = nn.ModuleList(
            nn.Sequential(block(cin, width, 2), block(width, width)) for cin in (3, width, width)
        )
        self.shared = block(width, width)
        self.heads = nn.ModuleList(nn.Conv2d(width, 9, 1) for _ in self.stages)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Scores and boxes by level."""
        found = [images]
        for stage in self.stages:
            found.append(stage(found[-1]))
        outputs: dict[str, Tensor] = {}
        above: Tensor | None = None
        for level in (2, 1, 0):
            x = found[level + 1]
            above = self.shared(x if above is None else x + F.interpolate(above, scale_factor=2.0))
            outputs[f"level{level}"] = self.heads[level](above)
        return outputs


@torch.no_grad()
def settle(net: nn.Module) -> nn.Module:
    """`net` itself, its batch norms with the statistics of drawn pictures."""
    for seed in range(20):
        net.train()(pictures(16, seed + 100))
    return net.eval()


def segmentation() -> nn.Module:
    """The example's net, trained for a while."""
    example: Any = importlib.import_module("segmentation")
    with redirect_stdout(sys.stderr):
        net: nn.Module = example.train(example.PyramidNet(), steps=200)
    return net


def timm_net(name: str, **options: Any) -> nn.Module:
    """A net of timm."""
    import timm

    net: nn.Module = timm.create_model(name, **options)
    return settle(net)


NETS: dict[str, Callable[[], nn.Module]] = {
    "demo (RepVGG, 12 classes, trained)": lambda: build(load_checkpoint(data_folder("models") / "demo.safetensors")),
    "PSPNet (examples/segmentation.py, trained)": segmentation,
    "detector, three levels": lambda: settle(Detector()),
    "timm repvgg_a0, features": lambda: timm_net("repvgg_a0", features_only=True),
    "timm mobileone_s0": lambda: timm_net("mobileone_s0", num_classes=100),
}


def measure(net: nn.Module, examples: list[Tensor], folder: Path) -> dict[str, ModuleExportResult]:
    """The results of all precisions."""
    return {
        precision: export_module(
            net, examples[0][:1], folder / f"net.{precision}.onnx", precision=precision, calibration=examples,
            engine="auto", recipe=RECIPE,
        )
        for precision in get_args(Precision)
    }  # fmt: skip


def rows_of(name: str, results: dict[str, ModuleExportResult]) -> list[str]:
    """One row of the table per output."""
    rows = []
    first = results["fp32"]
    engines = ", ".join(precision for precision, result in results.items() if result.engine is not None)
    for output in first.outputs:
        int8 = results["int8"].parity["quantized"][output]
        cells = [
            name,
            str(len(first.blocks)),
            output,
            *(f"{results[precision].parity['onnx'][output].relative:.1e}" for precision in ("fp32", "fp16")),
            f"{int8.relative:.1e}",
            f"{int8.top1_agreement:.1f} %",
            engines or "none",
        ]
        rows.append("| " + " | ".join(cells) + " |")
        name = ""
    return rows


def main(wanted: list[str]) -> None:
    """Print the table, net by net."""
    print("| net | blocks | output | fp32 | fp16 | INT8 | same class in INT8 | engines |")
    print("|---|---|---|---|---|---|---|---|")
    for name, make in NETS.items():
        if wanted and not any(part in name for part in wanted):
            continue
        torch.manual_seed(0)
        net = make()
        batches = [pictures(32, seed) for seed in range(CALIBRATION // 32)]
        if "PSPNet" in name:
            batches = list(torch.split(importlib.import_module("segmentation").draw(CALIBRATION, seed=3)[0], 32))
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(rows_of(name, measure(net, batches, Path(folder)))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
