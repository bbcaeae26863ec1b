"""Checks of a request, made before the work that an error would waste."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.graphs.repvgg import LOWEST_OPSET
from repvgg_deploy.images.labelled import list_labelled_images
from repvgg_deploy.images.sources import list_images
from repvgg_deploy.nets.spec import ArchSpec
from repvgg_deploy.workflows.export_request import ExportRequest, Int8Request


def check_request(request: ExportRequest, backend: Any) -> None:
    """Check what the options say by themselves, before a checkpoint is read.

    Raises:
        DeployError: an option is out of range, or names a folder or a recipe that cannot be used.
    """
    graph = request.graph
    newest = onnx.defs.onnx_opset_version()
    if not LOWEST_OPSET <= graph.opset <= newest:
        raise GraphError(f"--opset {graph.opset} is not supported", f"from {LOWEST_OPSET} to {newest}")
    if graph.features is not None and (graph.softmax or graph.topk is not None):
        raise GraphError("--softmax and --topk are for classes, and --features has none", "leave them out")
    if graph.class_names is not None and graph.topk is not None and graph.topk > len(graph.class_names):
        raise GraphError(
            f"--topk {graph.topk} is more than the {len(graph.class_names)} classes of --labels",
            "a smaller --topk",
        )
    if request.verify_data is not None:
        _check("--verify-data", list_images, request.verify_data)
    if backend is not None:
        request.build.check(backend)
    if request.int8 is not None:
        _check_int8(request.int8, backend is not None)


def has_full_range(request: Int8Request) -> bool:
    """Whether activations go up to 255, because the request or its recipe says so.

    Raises:
        DeployError: the recipe cannot be read.
    """
    from repvgg_deploy.quantization.recipe import load_recipe

    return request.full_range or load_recipe(request.recipe).full_range


def _check_int8(request: Int8Request, for_engine: bool) -> None:
    from repvgg_deploy.quantization.recipe import load_recipe
    from repvgg_deploy.quantization.statistics import check_cache

    if request.device == "cuda" and not torch.cuda.is_available():
        raise DeployError("--calib-device cuda: torch sees no CUDA GPU here", "leave it out, or install torch for CUDA")
    recipe = load_recipe(request.recipe)
    if has_full_range(request):
        if for_engine:
            raise DeployError(
                "with --full-range activations go up to 255, and TensorRT saturates at 127",
                "--engine none, for ONNX Runtime and OpenVINO",
            )
        if request.activation_type == "int8":
            raise DeployError("--full-range is for uint8: int8 ends at 127", "leave out --activation-type")
    if request.cache is not None:
        check_cache(request.cache, recipe.augmentations)
    if request.images is not None:
        _check("--calib", list_images, request.images)
    if request.validation is not None:
        _check("--val", list_labelled_images, request.validation)


def _check(option: str, read: Callable[[Path], object], path: Path) -> None:
    """Read what an option names; an error says which option it was."""
    try:
        read(path)
    except DeployError as error:
        raise type(error)(f"{option}: {error.message}", error.hint) from error


def check_classes(request: ExportRequest, spec: ArchSpec) -> None:
    """Check the options about classes against those of the checkpoint.

    Raises:
        DeployError: there are more or fewer labels than classes, or --topk asks for more than there are.
    """
    names, classes = request.graph.class_names, spec.classes
    if not classes:
        # A backbone: neither option applies to it.
        return
    if names is not None and len(names) != classes:
        raise DeployError(
            f"--labels has {len(names)} names, but the checkpoint has {classes} classes", "give one class per line"
        )
    if request.graph.features is None and request.graph.topk is not None and request.graph.topk > classes:
        raise GraphError(f"--topk {request.graph.topk} is more than the {classes} classes", f"from 1 to {classes}")
