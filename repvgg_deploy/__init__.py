"""repvgg-deploy: from a RepVGG checkpoint to a verified ONNX graph and a TensorRT engine.

The names listed in `__all__` are the public API; they are imported when they are first used, so that
`import repvgg_deploy` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repvgg_deploy.artifacts import Precision as Precision
    from repvgg_deploy.artifacts import Preprocessing as Preprocessing
    from repvgg_deploy.benchmark.run import run_benchmark as run_benchmark
    from repvgg_deploy.checkpoints.loading import Checkpoint as Checkpoint
    from repvgg_deploy.checkpoints.loading import build as build
    from repvgg_deploy.checkpoints.loading import load_checkpoint as load_checkpoint
    from repvgg_deploy.engine.runner import load_engine as load_engine
    from repvgg_deploy.errors import DeployError as DeployError
    from repvgg_deploy.fusion.fuse import equivalent_kernel_bias as equivalent_kernel_bias
    from repvgg_deploy.fusion.fuse import fuse as fuse
    from repvgg_deploy.quantization.net import QuantizedNet as QuantizedNet
    from repvgg_deploy.quantization.qat import convert_qat as convert_qat
    from repvgg_deploy.quantization.qat import prepare_qat as prepare_qat
    from repvgg_deploy.quantization.quantize import quantize as quantize
    from repvgg_deploy.quantization.recipe import load_recipe as load_recipe
    from repvgg_deploy.runtime.model import Model as Model
    from repvgg_deploy.runtime.model import open_model as open_model
    from repvgg_deploy.serving.predictor import Prediction as Prediction
    from repvgg_deploy.serving.predictor import PredictOptions as PredictOptions
    from repvgg_deploy.serving.predictor import Predictor as Predictor
    from repvgg_deploy.verification.models import verify_models as verify_models
    from repvgg_deploy.workflows.evaluate import evaluate as evaluate
    from repvgg_deploy.workflows.export import export as export
    from repvgg_deploy.workflows.export_module import export_module as export_module
    from repvgg_deploy.workflows.export_request import ExportRequest as ExportRequest
    from repvgg_deploy.workflows.export_request import Int8Request as Int8Request
    from repvgg_deploy.workflows.export_result import CheckpointExportResult as CheckpointExportResult
    from repvgg_deploy.workflows.export_result import ExportResult as ExportResult
    from repvgg_deploy.workflows.export_result import ModuleExportResult as ModuleExportResult
    from repvgg_deploy.workflows.predict import predict as predict

__version__ = "0.1.0"

# ONNX Runtime reads it when it is loaded, by whichever module. Its telemetry, from 1.31 on, keeps an identifier of the
# device on the disk, prints a warning where it cannot, and sends what it collects. `0` in the environment turns it on.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Checkpoint": "checkpoints.loading",
    "CheckpointExportResult": "workflows.export_result",
    "DeployError": "errors",
    "ExportRequest": "workflows.export_request",
    "ExportResult": "workflows.export_result",
    "Int8Request": "workflows.export_request",
    "Model": "runtime.model",
    "ModuleExportResult": "workflows.export_result",
    "Precision": "artifacts",
    "PredictOptions": "serving.predictor",
    "Prediction": "serving.predictor",
    "Predictor": "serving.predictor",
    "Preprocessing": "artifacts",
    "QuantizedNet": "quantization.net",
    "build": "checkpoints.loading",
    "convert_qat": "quantization.qat",
    "equivalent_kernel_bias": "fusion.fuse",
    "evaluate": "workflows.evaluate",
    "export": "workflows.export",
    "export_module": "workflows.export_module",
    "fuse": "fusion.fuse",
    "load_checkpoint": "checkpoints.loading",
    "load_engine": "engine.runner",
    "load_recipe": "quantization.recipe",
    "open_model": "runtime.model",
    "predict": "workflows.predict",
    "prepare_qat": "quantization.qat",
    "quantize": "quantization.quantize",
    "run_benchmark": "benchmark.run",
    "verify_models": "verification.models",
}

__all__ = [*sorted(_HOMES), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that it lives in (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
