"""What can be named on the command line: backends, precisions and modes of a benchmark."""

from __future__ import annotations

PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
}
"""The backends of ONNX Runtime, with the names of their execution providers."""

ENGINES = ("tensorrt", "tensorrt-rtx")
BACKENDS = (*PROVIDERS, "torch-cpu", "torch-cuda", *ENGINES)
PRECISIONS = ("fp32", "fp16", "bf16", "tf32", "int8")
MODES = ("eager", "compiled", "cuda-graph")
