"""Runs ONNX graphs in a runtime, as a program of its own so that an emulator can stand in for another CPU.

usage: run_integers.py onnxruntime|openvino FOLDER

Every NAME.onnx in FOLDER is run on NAME.npy, and its first output written to NAME.out.npy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(runtime: str, folder: str) -> None:
    """Run all graphs of `folder`."""
    for graph in sorted(Path(folder).glob("*.onnx")):
        run = in_openvino if runtime == "openvino" else in_onnxruntime
        np.save(graph.with_suffix(".out.npy"), run(str(graph), np.load(graph.with_suffix(".npy"))))


def in_onnxruntime(graph: str, images: Any) -> Any:
    """The first output, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def in_openvino(graph: str, images: Any) -> Any:
    """The first output, on one thread, without bfloat16 where the CPU has it."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(graph), "CPU", settings)(images)[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
