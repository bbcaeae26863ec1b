"""Trains the demo model, a small RepVGG, on drawn pictures: `python models/train_demo.py -o models/demo.safetensors`.

The recipe is the usual one of RepVGG (SGD, cosine schedule, weight decay on the convolutions, label smoothing), so
that the checkpoint's BN statistics and kernels are those of an ordinary net. The data are drawn by
`repvgg_deploy.images.synthetic`; the held-out set is another seed. The file has the key names of the official code.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.images.synthetic import CLASS_NAMES, draw_image, image_seed
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import RepVGG

TRAINING_SEED, HELD_OUT_SEED = 1, 2
CHUNK = 500
BATCH = 64
PEAK_LR = 0.1
WEIGHT_DECAY = 5e-4


def main() -> None:
    """Draws the data, trains the linear classifier and the net, and writes the net."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    card = find_card("demo")
    started = time.perf_counter()
    size = card.preprocessing.height
    with ProcessPoolExecutor() as pool:
        train_set = draw_set(pool, arguments.images, TRAINING_SEED, size)
        held_out = draw_set(pool, arguments.held_out, HELD_OUT_SEED, size)
    seconds = time.perf_counter() - started
    print(f"drew {arguments.images} + {arguments.held_out} pictures in {seconds:.0f} s", flush=True)
    linear = train_linear(train_set, held_out)
    print(f"linear classifier on the pixels: top-1 {linear:.2f} %", flush=True)
    net = RepVGG(card.spec())
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_net(net, train_set, held_out, card.preprocessing, arguments.epochs)
    top1 = measure_top1(net, *held_out, card.preprocessing)
    save_official(net, top1, arguments.output)
    seconds, size_mb = time.perf_counter() - started, arguments.output.stat().st_size / 1e6
    print(f"top-1 {top1:.2f} % on {arguments.held_out} held-out pictures, {size_mb:.2f} MB, {seconds:.0f} s")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("demo.safetensors"))
    parser.add_argument("--images", type=int, default=16000, help="pictures to train on")
    parser.add_argument("--held-out", type=int, default=4000, help="pictures to measure top-1 on")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of torch; another count rounds otherwise")
    return parser.parse_args()


def draw_set(pool: ProcessPoolExecutor, count: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """The set `seed`, as `draw_images` gives it: uint8 (count, 3, size, size) and int64 (count,)."""
    starts = range(0, count, CHUNK)
    stops = [min(start + CHUNK, count) for start in starts]
    rows = len(stops)
    parts = list(pool.map(_draw_part, starts, stops, [seed] * rows, [size] * rows))
    images = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)
    return images, torch.arange(count) % len(CLASS_NAMES)


def _draw_part(start: int, stop: int, seed: int, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    images = (draw_image(i % len(CLASS_NAMES), image_seed(seed, i), size) for i in range(start, stop))
    return np.stack([np.asarray(image) for image in images])


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The net's input: float32 of uint8 (N, 3, H, W)."""
    mean = 255 * torch.tensor(preprocessing.mean)[:, None, None]
    std = 255 * torch.tensor(preprocessing.std)[:, None, None]
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def mirror(images: Tensor) -> Tensor:
    """Each picture in one of its eight orientations, at random."""
    for axes in ((2,), (3,)):
        images = torch.where(_coin(images), images.flip(axes), images)
    return torch.where(_coin(images), images.transpose(2, 3), images)


def _coin(images: Tensor) -> Tensor:
    return torch.rand(len(images), 1, 1, 1) < 0.5


def batches(count: int) -> Iterator[Tensor]:
    """The indices of one epoch in random order, without the incomplete last batch."""
    order = torch.randperm(count)
    for start in range(0, count - BATCH + 1, BATCH):
        yield order[start : start + BATCH]


def train_net(
    net: RepVGG,
    train_set: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    preprocessing: Preprocessing,
    epochs: int,
) -> None:
    """Trains `net` in place and prints loss and top-1 after every fifth epoch."""
    images, labels = train_set
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=PEAK_LR, momentum=0.9, nesterov=True)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=steps, pct_start=0.08, cycle_momentum=False, div_factor=20, final_div_factor=1e3
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(1, epochs + 1):
        net.train()
        losses = []
        for chosen in batches(len(images)):
            loss = criterion(net(mirror(normalize(images[chosen], preprocessing))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        note = f", top-1 {measure_top1(net, *held_out, preprocessing):.2f} %" if epoch % 5 == 0 else ""
        print(f"epoch {epoch:3d}: loss {np.mean(losses):.3f}{note}", flush=True)


@torch.no_grad()
def measure_top1(net: RepVGG, images: Tensor, labels: Tensor, preprocessing: Preprocessing) -> float:
    """Top-1 in percent, in evaluation mode."""
    net.eval()
    outputs = [net(normalize(part, preprocessing)).argmax(1) for part in torch.split(images, 500)]
    return 100 * (torch.cat(outputs) == labels).float().mean().item()


def train_linear(train_set: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], epochs: int = 8) -> float:
    """The held-out top-1, in percent, of a logistic regression on the standardized pixels of the same pictures."""
    images, labels = train_set
    model = nn.Linear(images[0].numel(), len(CLASS_NAMES))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    for _ in range(epochs):
        for chosen in batches(len(images)):
            loss = criterion(model(_pixels(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        hits = [model(_pixels(part)).argmax(1) for part in torch.split(held_out[0], 500)]
    return 100 * (torch.cat(hits) == held_out[1]).float().mean().item()


def _pixels(images: Tensor) -> Tensor:
    return (images.flatten(1).float() - 128) / 64


def save_official(net: RepVGG, top1: float, path: Path) -> None:
    """Writes the state of `net` under the official code's key names, with the classes and `top1` as metadata."""
    state = {official_key(key): value.contiguous() for key, value in net.state_dict().items()}
    metadata = {"class_names": json.dumps(CLASS_NAMES), "top1": f"{top1:.2f}"}
    save_file(state, path, metadata)


def official_key(key: str) -> str:
    """The official code's name for one of our keys: `stages.1.0.branch_3x3.bn.bias` → `stage1.0.rbr_dense.bn.bias`."""
    key = key.replace("branch_3x3", "rbr_dense").replace("branch_1x1", "rbr_1x1")
    key = key.replace("branch_identity.bn", "rbr_identity").replace("classifier.", "linear.")
    # Stage 0 is a block there, the others are sequences of blocks.
    return re.sub(r"^stages\.(\d+)", r"stage\1", re.sub(r"^stages\.0\.0\.", "stage0.", key))


if __name__ == "__main__":
    main()
