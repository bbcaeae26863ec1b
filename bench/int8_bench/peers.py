"""Accuracy of INT8 by ONNX Runtime, nvidia-modelopt, NNCF, AMD Quark and this project: same net, images and evaluation.

    python bench/int8.py peers --checkpoint CKPT --calib DIR --val DIR -o bench/results
    python bench/int8.py peers … --files FILES     # once on each CPU: the second run evaluates the files of the first

In every file all convolutions are quantized. It runs in ONNX Runtime on the CPU in two ways:

- `native`: as ONNX Runtime does it here. A CPU without VNNI adds products in 16 bits, which saturate with many files;
  not with modelopt's, whose convolutions ONNX Runtime computes in float.
- `exact`: with kernels that cannot saturate. On a CPU whose kernels do not, the option for them does nothing, so
  `native` is what `exact` says there.

Where OpenVINO is installed, `openvino` is the same file in it. This project's files are those of `export --int8`; their
rows "as TensorRT" have activations that saturate as they do there (uint8 is int8 there). See `tools.py` for how to
install the other tools.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from int8_bench.options import COUNT, FOLDER, Data, cpu_note_option, data_options
from int8_bench.setup import (
    Floats,
    compare,
    load_fused,
    read_calibration,
    read_validation,
    run_onnx,
    run_openvino,
    run_torch,
    timed,
    write_record,
)
from int8_bench.tools import FP32, Tool, list_tools, path_in
from repvgg_deploy.runtime.saturation import saturates_here


@dataclass(frozen=True)
class Selection:
    """Which rows are measured, and where their files are kept."""

    only: tuple[str, ...]
    folder: Path
    evaluated: bool


@click.command()
@data_options
@click.option(
    "--only", multiple=True, metavar="PART", help="Part of the names of the rows to measure; needed for the slow ones."
)
@click.option(
    "--images", "image_count", type=COUNT, metavar="N", help="Validation images to evaluate, evenly spaced; all."
)
@click.option("--files", type=FOLDER, metavar="DIR", help="Keep the files; those found there are not made again.")
@click.option("--evaluation/--no-evaluation", default=True, help="--no-evaluation only makes the files.")
@cpu_note_option
def peers(
    data: Data, only: tuple[str, ...], image_count: int | None, files: Path | None, evaluation: bool, cpu_note: str
) -> None:
    """Accuracy of INT8 by other tools and by this project: same net, same images."""
    with contextlib.ExitStack() as stack:
        folder = files or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        _measure(data, Selection(only, folder, evaluation), image_count, cpu_note)


def _measure(data: Data, selection: Selection, image_count: int | None, cpu_note: str | None) -> None:
    """Quantize with every chosen tool, evaluate, print and record the table."""
    fused = load_fused(data.checkpoint)
    calibration = read_calibration(data.calib, data.count)
    images, labels = read_validation(data.val, image_count)
    expected = run_torch(fused, images)
    given = {"checkpoint": _digest(data.checkpoint), "calibration_images": len(calibration)}
    more = {**given, "openvino": _find_openvino()}
    kind = "int8-peers-without-vnni" if saturates_here() else "int8-peers"
    results: list[dict[str, Any]] = []
    for tool in list_tools(fused, calibration, selection.folder):
        chosen = _is_chosen(tool, selection)
        if not chosen and tool.name != FP32:
            continue
        row = _make_once(tool, selection.folder, given)
        if not chosen or not selection.evaluated:
            continue
        results.append({**row, **evaluate(path_in(selection.folder, tool.name), images, expected, labels)})
        print(results[-1], flush=True)
        # After each row: the slow ones come last.
        path = write_record(data.output, kind, results, cpu_note=cpu_note, **more)
        print(f"fp32 top-1 {np.mean(expected.argmax(1) == labels) * 100:.2f}; written {path}")


def evaluate(path: Path, images: Floats, expected: Floats, labels: NDArray[np.int64]) -> dict[str, Any]:
    """The figures of a file as this CPU runs it, with exact integers, and in OpenVINO where it is installed."""
    logits = {"native": run_onnx(path, images)}
    logits["exact"] = run_onnx(path, images, exact=True) if saturates_here() else logits["native"]
    if _find_openvino():
        logits["openvino"] = run_openvino(path, images)
    return {way: asdict(compare(values, expected, labels)) for way, values in logits.items()}


def _is_chosen(tool: Tool, selection: Selection) -> bool:
    if selection.only:
        return any(part in tool.name for part in selection.only)
    return not tool.slow or path_in(selection.folder, tool.name).exists()


def _make_once(tool: Tool, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Make a tool's file unless it is there, and return its row: tool, version, seconds, bytes.

    Raises:
        ClickException: the file that is there was made from another checkpoint or number of images.
    """
    target = path_in(folder, tool.name)
    about = target.with_suffix(".json")
    if not about.exists():
        # In a process of its own: modelopt replaces methods of ONNX Runtime's calibrators, which Quark then fails with.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            _, seconds = process.submit(timed, partial(tool.make, target)).result()
        row = {"tool": tool.name, "version": tool.version, "seconds": seconds, "bytes": target.stat().st_size}
        about.write_text(json.dumps({"given": given, "row": row}), encoding="utf-8")
    found = json.loads(about.read_text(encoding="utf-8"))
    if found["given"] != given:
        raise click.ClickException(f"{target} was made from {found['given']}, not {given}; name another folder")
    row = found["row"]
    return dict(row)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _find_openvino() -> str | None:
    return importlib.metadata.version("openvino") if importlib.util.find_spec("openvino") else None
