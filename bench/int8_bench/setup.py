"""What the INT8 benchmarks share: the net, the images, the figures, the records."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.hardware.cpu import read_cpu
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.images.labelled import list_labelled_images
from repvgg_deploy.images.reading import BrokenImages, read_batches
from repvgg_deploy.images.sources import list_images
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.seeding import seeded_repvgg
from repvgg_deploy.quantization import Recipe, load_recipe, quantize
from repvgg_deploy.quantization.qdq import as_tensorrt_reads, to_qdq_onnx
from repvgg_deploy.runtime.saturation import saturates_here

Floats = NDArray[np.float32]
PIXELS = 64
PREPROCESSING = Preprocessing(PIXELS, PIXELS, PIXELS)


@dataclass(frozen=True)
class Figures:
    """How a candidate's logits stand against the float net's: percent, percent, dB; `top1_fp32` for the drop.

    `median_db` is the SQNR of the median image, which no few images with enormous logits decide. `drop_error` is the
    standard error of the drop in top-1, in points: both nets see the same images, so it comes from those alone on which
    just one of them is right (McNemar, https://doi.org/10.1007/BF02295996).
    """

    top1: float
    top1_fp32: float
    agreement: float
    sqnr_db: float
    median_db: float
    images: int
    drop_error: float


def load_fused(path: Path) -> RepVGG:
    """The fused float32 net of a checkpoint, without gradients."""
    net = fuse(build(load_checkpoint(path)), torch.float32)
    assert isinstance(net, RepVGG)
    return net.eval().requires_grad_(False)


def fuse_seeded(arch: str) -> RepVGG:
    """The fused net of a card with seeded weights."""
    net = fuse(seeded_repvgg(find_card(arch)), torch.float32)
    assert isinstance(net, RepVGG)
    return net.eval().requires_grad_(False)


def read_validation(folder: Path, count: int | None = None) -> tuple[Floats, NDArray[np.int64]]:
    """The images of `folder`/<class>/…, normalized, and their labels: all, or `count` evenly spaced ones."""
    images = list_labelled_images(folder)
    total = len(images.paths)
    chosen = np.linspace(0, total, min(count or total, total), endpoint=False).astype(np.int64)
    return _read([images.paths[index] for index in chosen]), np.asarray(images.labels)[chosen]


def read_calibration(folder: Path, count: int, seed: int = 0, preprocessing: Preprocessing = PREPROCESSING) -> Floats:
    """`count` images of a folder, chosen by `seed`."""
    paths = list_images(folder)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(paths))[:count])
    return _read([paths[index] for index in chosen], preprocessing)


def _read(paths: Any, preprocessing: Preprocessing = PREPROCESSING) -> Floats:
    broken = BrokenImages()
    batches = read_batches(list(paths), preprocessing, 256, broken)
    images = np.concatenate([normalize(pixels, preprocessing) for pixels, _ in batches])
    assert not broken.reasons
    return images


def in_batches(images: Floats, size: int = 64) -> list[Floats]:
    """`images` cut into batches."""
    return [images[start : start + size] for start in range(0, len(images), size)]


@torch.no_grad()
def run_torch(net: torch.nn.Module, images: Floats) -> Floats:
    """The logits of a torch net."""
    parts = [net(torch.from_numpy(np.ascontiguousarray(batch))).numpy() for batch in in_batches(images, 200)]
    return np.concatenate(parts)


def open_session(model: str | bytes, exact: bool = False) -> ort.InferenceSession:
    """An ONNX Runtime session on two CPU threads; `exact` asks for integer kernels that cannot saturate in 16 bits."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_onnx(path: Path, images: Floats, exact: bool = False) -> Floats:
    """The logits of an ONNX file in ONNX Runtime on the CPU; see `open_session` for `exact`."""
    session = open_session(str(path), exact)
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: np.ascontiguousarray(batch)})[0] for batch in in_batches(images, 200)]
    return np.concatenate(parts)


def run_openvino(path: Path, images: Floats) -> Floats:
    """The logits of an ONNX file in OpenVINO on the CPU; what is not INT8 is float32, also where there is bfloat16."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    return np.concatenate([compiled(np.ascontiguousarray(batch))[0] for batch in in_batches(images, 200)])


def quantize_ours(fused: RepVGG, recipe: str | Recipe, images: Floats, target: Path) -> None:
    """This project's Q/DQ graph."""
    net = quantize(fused, in_batches(images), load_recipe(recipe) if isinstance(recipe, str) else recipe)
    height, width = images.shape[2:]
    write_graph(to_qdq_onnx(net, GraphOptions(height, width), {}), target)


def write_as_tensorrt_reads(source: Path, target: Path) -> None:
    """A graph for TensorRT whose activations saturate as they do there."""
    onnx.save(as_tensorrt_reads(onnx.load(source)), target)


def run_ours(
    fused: RepVGG, recipe: str | Recipe, calibration: Floats, images: Floats
) -> tuple[dict[str, Floats], float]:
    """The logits of this project's graph in ONNX Runtime, as it is and as TensorRT reads it, and the wall seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        graph, as_engine = Path(scratch) / "int8.onnx", Path(scratch) / "engine.onnx"
        _, seconds = timed(lambda: quantize_ours(fused, recipe, calibration, graph))
        write_as_tensorrt_reads(graph, as_engine)
        logits = {"onnxruntime": run_onnx(graph, images), "as TensorRT": run_onnx(as_engine, images)}
    return logits, seconds


def compare(logits: Floats, exact: Floats, labels: NDArray[np.int64]) -> Figures:
    """The figures of `logits` against those of the float net."""
    best, wanted = logits.argmax(1), exact.argmax(1)
    wide = exact.astype(np.float64)
    # Lost and won images: the drop is their difference, and chance moves it by the root of their sum.
    one_is_right = int(((wanted == labels) != (best == labels)).sum())
    energy, noise = (wide**2).sum(1), np.maximum(((logits - wide) ** 2).sum(1), 1e-300)
    return Figures(
        round(float((best == labels).mean()) * 100, 2),
        round(float((wanted == labels).mean()) * 100, 2),
        round(float((best == wanted).mean()) * 100, 2),
        round(10 * float(np.log10(energy.sum() / noise.sum())), 2),
        round(10 * float(np.log10(np.median(energy / noise))), 2),
        len(logits),
        round(100 * one_is_right**0.5 / len(logits), 2),
    )


def write_record(folder: Path, what: str, results: Any, *, cpu_note: str | None = None, **more: Any) -> Path:
    """Write a JSON record named after the backend, its version and the day; `cpu_note` is for the machine's part."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    record = {
        "kind": what,
        "machine": _describe_machine() | ({"note": cpu_note} if cpu_note else {}),
        "date": date,
        "backend": "onnxruntime",
        "backend_version": ort.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        **more,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"cpu-onnxruntime-{ort.__version__}-{date}-{what}.json"
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


def _describe_machine() -> dict[str, Any]:
    """The CPU as the system names it, and whether the sums in its integer kernels saturate, which was tried."""
    cpu = read_cpu()
    return {
        "cpu": cpu.model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "integer_instructions": cpu.integer_instructions,
        "saturates": saturates_here(),
    }


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What `function` returns, and the wall seconds it took."""
    start = time.perf_counter()
    result = function()
    return result, round(time.perf_counter() - start, 1)
