"""A sidecar that is made up."""

from __future__ import annotations

from helpers.engine_graphs import provenance
from repvgg_deploy.artifacts import Precision
from repvgg_deploy.engine.network import Tensor
from repvgg_deploy.engine.options import BuildOptions
from repvgg_deploy.engine.sidecar import (
    Sidecar,
)
from repvgg_deploy.hardware.gpus import Gpu


def make_side(sha256: str = "0" * 64, size: int = 1, gpu: Gpu | None = None, **options: object) -> Sidecar:
    return Sidecar(
        sha256=sha256,
        bytes=size,
        backend="tensorrt-rtx" if gpu is None else "tensorrt",
        backend_version="1.7.1.116" if gpu is None else "10.16.1.11",
        gpu=gpu,
        driver="",
        profile=(1, 32, 256),
        inputs=(Tensor("images", "float32", (-1, 3, 224, 224)),),
        outputs=(Tensor("logits", "float32", (-1, 1000)),),
        options=BuildOptions(**options),
        convolutions={"fp16": 22},
        onnx_sha256="1" * 64,
        provenance=provenance(Precision.FP16),
        seconds={"total": 1.25},
        warnings=("one of them",),
    )
