"""A segmentation net with a RepVGG backbone, from its training to an INT8 graph and an engine, on two cores.

    python examples/segmentation.py [--qat] [FOLDER]

A small PSPNet (dilated last blocks, pooling at three sizes, upsampling) learns to find circles, squares and triangles
in drawn pictures. It is exported in fp32 and INT8; what both find is scored by mean intersection over union (mIoU), and
drawn side by side. With `--qat` the net is then trained for its integers, in its own training loop, and exported with
the scales it learned. Needs `pip install 'repvgg-deploy[cpu,modules]'`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from repvgg_deploy import convert_qat, export_module, prepare_qat
from repvgg_deploy.quantization.qat import QatScales
from repvgg_deploy.quantization.qat_scales import observe_scales

SIZE, CLASSES, STEPS, BATCH = 64, 4, 500, 16
COLORS = np.array([[30, 30, 40], [230, 90, 70], [80, 180, 250], [250, 210, 80]], np.uint8)


class Block(nn.Module):
    """A RepVGG block: a 3x3 branch, a 1x1 branch and, where the shape stays, the input's batch norm."""

    def __init__(self, cin: int, cout: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.rbr_dense = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(cout)
        )
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        self.rbr_identity = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same size, divided by the stride."""
        total = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            total = total + self.rbr_identity(x)
        return cast(Tensor, self.nonlinearity(total))


class PyramidNet(nn.Module):
    """PSPNet in small: the last blocks are dilated in place of a stride, and see the whole picture by pooling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        wide = 2 * width
        self.backbone = nn.Sequential(
            Block(3, width, 2), Block(width, width), Block(width, wide, 2), Block(wide, wide),
            Block(wide, wide, dilation=2), Block(wide, wide, dilation=2), Block(wide, wide, dilation=4),
        )  # fmt: skip
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(wide, width // 2, 1), nn.ReLU()) for size in (1, 2, 4)
        )
        self.head = nn.Conv2d(wide + 3 * (width // 2), CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, classes, H, W) of every pixel."""
        x = self.backbone(images)
        seen = [F.interpolate(pool(x), size=x.shape[2:], mode="bilinear", align_corners=False) for pool in self.pools]
        scores = self.head(torch.cat([x, *seen], 1))
        return F.interpolate(scores, size=images.shape[2:], mode="bilinear", align_corners=False)


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, H, W) of 0 to 1 with one to three figures, and the class of every pixel (N, H, W)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    pictures = np.empty((count, 3, SIZE, SIZE), np.float32)
    masks = np.zeros((count, SIZE, SIZE), np.int64)
    for picture, mask in zip(pictures, masks, strict=True):
        slope = random.uniform(-0.4, 0.4, (3, 2)) / SIZE
        picture[:] = random.uniform(0.2, 0.8, (3, 1, 1)) + slope[:, :1, None] * y + slope[:, 1:, None] * x
        for _ in range(random.integers(1, 4)):
            kind, radius = random.integers(1, CLASSES), random.uniform(7, 14)
            dy, dx = (axis - random.uniform(radius, SIZE - radius) for axis in (y, x))
            inside = {
                1: dy**2 + dx**2 < radius**2,
                2: np.maximum(np.abs(dy), np.abs(dx)) < 0.85 * radius,
                3: (dy < 0.7 * radius) & (dy > 2 * np.abs(dx) - radius),
            }[int(kind)]
            picture[:, inside] = random.uniform(0, 1, (3, 1))
            mask[inside] = kind
        picture += random.normal(0, 0.04, picture.shape)
    return torch.from_numpy(pictures.clip(0, 1)), torch.from_numpy(masks)


def train(net: nn.Module, steps: int = STEPS, rate: float = 1e-2) -> nn.Module:
    """`net` itself, trained on other pictures in every step."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    pictures, masks = draw(1024, seed=1)
    for step in range(steps):
        chosen = torch.randint(len(pictures), (BATCH,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(net(pictures[chosen]), masks[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"  step {step + 1} of {steps}: loss {loss.item():.3f}")
    return net.eval()


def train_for_int8(net: nn.Module, batches: list[Tensor], steps: int) -> tuple[nn.Module, QatScales]:
    """A trained `net` after more of the same training, with its blocks in integers, and the scales of the integers."""
    prepared = prepare_qat(net, observe_scales(net, batches))
    return convert_qat(train(prepared, steps, rate=1e-3))


def find(graph: Path, pictures: Tensor) -> NDArray[np.int64]:
    """The class of every pixel (N, H, W) as ONNX Runtime computes it."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    scores: Any = session.run(None, {"images": pictures.numpy()})[0]
    return np.asarray(scores.argmax(1), np.int64)


def mean_iou(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Mean intersection over union of the classes, in percent."""
    ratios = []
    for kind in range(CLASSES):
        a, b = found == kind, truth == kind
        ratios.append((a & b).sum() / max(1, (a | b).sum()))
    return 100 * float(np.mean(ratios))


def compose(path: Path, pictures: Tensor, masks: list[NDArray[np.int64]], scale: int = 2) -> None:
    """Write a picture with one row per image: the image, then the masks."""
    columns = [(255 * pictures.permute(0, 2, 3, 1).numpy()).astype(np.uint8), *(COLORS[mask] for mask in masks)]
    padded = [np.pad(column, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255) for column in columns]
    rows = np.concatenate([np.concatenate(list(column), 0) for column in padded], 1)
    Image.fromarray(rows).resize((rows.shape[1] * scale, rows.shape[0] * scale), Image.Resampling.NEAREST).save(path)


def main(folder: Path, steps: int = STEPS, qat: bool = False) -> dict[str, float]:
    """Train, export, score and draw; returned is the mIoU in percent by precision, and of the net trained for INT8."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    start = time.perf_counter()
    print("training")
    net = train(PyramidNet(), steps)
    pictures, truth = draw(256, seed=2)
    calibration = list(draw(128, seed=3)[0].split(32))
    scores: dict[str, float] = {}
    masks: list[NDArray[np.int64]] = []
    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    for precision in precisions:
        graph = folder / f"segmentation.{precision}.onnx"
        result = export_module(net, pictures[:1], graph, precision=precision, calibration=calibration, engine="auto")
        masks.append(find(graph, pictures))
        scores[precision] = mean_iou(masks[-1], truth.numpy())
        engine = "no engine" if result.engine is None else f"{result.engine.side.label} engine"
        print(f"{precision}: {len(result.blocks)} blocks fused, mIoU {scores[precision]:.2f} %, {engine}, {graph}")
        for stage, outputs in result.parity.items():
            for name, parity in outputs.items():
                print(f"  {stage}, {name}: relative {parity.relative:.1e}, equal pixels {parity.top1_agreement:.2f} %")
    if qat:
        print("training for INT8")
        trained, scales = train_for_int8(net, calibration, steps // 4)
        graph = folder / "segmentation.qat.onnx"
        export_module(trained, pictures[:1], graph, precision="int8", calibration=calibration, scales=scales)
        scores["qat"] = mean_iou(find(graph, pictures), truth.numpy())
        print(f"int8, trained for it: mIoU {scores['qat']:.2f} %, {graph}")
    compose(folder / "segmentation.png", pictures[:4], [mask[:4] for mask in masks])
    print(f"{folder / 'segmentation.png'}: the picture, fp32, INT8; {time.perf_counter() - start:.0f} s in all")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out"))
    parser.add_argument("--qat", action="store_true", help="train for INT8 as well")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    main(arguments.folder, qat=arguments.qat)
