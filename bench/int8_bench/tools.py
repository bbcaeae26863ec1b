"""The tools that make the INT8 files of `peers`, and the settings each is measured with.

A tool that is not installed is left out with a note on stderr:

    pip install nncf openvino
    pip install amd-quark
    pip install --no-deps nvidia-modelopt==0.47.0 onnx-graphsurgeon polygraphy onnxslim onnxconverter-common

and, for the last, its pure-Python dependencies.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import repvgg_deploy
from int8_bench.setup import PIXELS, Floats, in_batches, quantize_ours, write_as_tensorrt_reads
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.nets.repvgg import RepVGG

FP32 = "fp32"
OURS = "repvgg-deploy"


@dataclass(frozen=True)
class Tool:
    """One way to make a file of the net: `make` writes it to a path.

    `slow` ones take many minutes for this small net: they are left out unless named, or made already.
    """

    name: str
    version: str
    make: Callable[[Path], None]
    slow: bool = False


def path_in(folder: Path, name: str) -> Path:
    """Where a tool's file is kept."""
    return folder / f"{name.replace(',', '').replace(' ', '-')}.onnx"


def list_tools(fused: RepVGG, calibration: Floats, folder: Path) -> list[Tool]:
    """The float graph, every tool that is installed, and this project; the tools read the float graph from `folder`."""
    source = path_in(folder, FP32)
    return [
        Tool(FP32, repvgg_deploy.__version__, partial(write_fp32, fused)),
        *_list_onnxruntime(source, calibration),
        *_list_installed("modelopt", "nvidia-modelopt", partial(_list_modelopt, source, calibration)),
        *_list_installed("nncf", "nncf", partial(_list_nncf, source, calibration)),
        *_list_installed("quark", "amd-quark", partial(_list_quark, source, calibration)),
        *_list_ours(fused, calibration, folder),
    ]


def _list_installed(module: str, package: str, list_them: Callable[[str], list[Tool]]) -> list[Tool]:
    if importlib.util.find_spec(module) is None:
        print(f"{package} is not installed: its rows are left out", file=sys.stderr)
        return []
    return list_them(importlib.metadata.version(package))


def write_fp32(fused: RepVGG, target: Path) -> None:
    """The float32 graph that the other tools quantize."""
    write_graph(to_onnx(fused, FloatLayers(), GraphOptions(PIXELS, PIXELS), {}), target)


def _list_ours(fused: RepVGG, calibration: Floats, folder: Path) -> list[Tool]:
    tools = []
    for recipe in ("fast", "accurate", "thorough"):
        name = f"{OURS} {recipe}"
        as_read = partial(write_as_tensorrt_reads, path_in(folder, name))
        tools.append(Tool(name, repvgg_deploy.__version__, partial(quantize_ours, fused, recipe, calibration)))
        tools.append(Tool(f"{name}, as TensorRT", repvgg_deploy.__version__, as_read))
    return tools


def calibration_reader(images: Floats) -> object:
    """ONNX Runtime's `CalibrationDataReader` over batches, which Quark takes as well."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Floats] = iter(in_batches(images))

        def get_next(self) -> dict[str, Floats] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    return Reader()


def _list_onnxruntime(source: Path, calibration: Floats) -> list[Tool]:
    return [
        Tool(
            f"onnxruntime {'per-channel' if per_channel else 'per-tensor'} {method}",
            onnxruntime.__version__,
            partial(quantize_onnxruntime, source, method, per_channel, calibration),
        )
        for per_channel, method in product((False, True), ("minmax", "percentile", "entropy"))
    ]


def quantize_onnxruntime(source: Path, method: str, per_channel: bool, images: Floats, target: Path) -> None:
    """ONNX Runtime's `quantize_static`, with its default types."""
    from onnxruntime.quantization import CalibrationMethod, quantize_static

    calibration = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }[method]
    reader = calibration_reader(images)
    quantize_static(str(source), str(target), reader, per_channel=per_channel, calibrate_method=calibration)


def _list_modelopt(source: Path, calibration: Floats, version: str) -> list[Tool]:
    return [
        Tool(f"modelopt {method}", version, partial(quantize_modelopt, source, method, calibration))
        for method in ("max", "entropy")
    ]


def quantize_modelopt(source: Path, method: str, images: Floats, target: Path) -> None:
    """nvidia-modelopt's ONNX quantization."""
    from modelopt.onnx.quantization import quantize

    with tempfile.TemporaryDirectory() as scratch:
        # It writes names into the file that it is given.
        copy = shutil.copy(source, scratch)
        quantize(
            str(copy),
            quantize_mode="int8",
            calibration_data=images,
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(target),
        )


def _list_nncf(source: Path, calibration: Floats, version: str) -> list[Tool]:
    return [
        Tool(name, version, partial(quantize_nncf, source, fast, calibration))
        for name, fast in (("NNCF", True), ("NNCF, full bias correction", False))
    ]


def quantize_nncf(source: Path, fast_bias_correction: bool, images: Floats, target: Path) -> None:
    """NNCF's post-training quantization of an ONNX graph: symmetric weights, asymmetric activations, image by image."""
    import nncf

    def as_input(image: Floats) -> dict[str, Floats]:
        return {"images": image[np.newaxis]}

    quantized = nncf.quantize(
        onnx.load(source),
        nncf.Dataset(list(images), as_input),
        subset_size=len(images),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=fast_bias_correction,
    )
    onnx.save(quantized, target)


def _list_quark(source: Path, calibration: Floats, version: str) -> list[Tool]:
    settings = {
        "Quark U8S8": ("U8S8_AAWS", False),
        "Quark U8S8, per-channel": ("U8S8_AAWS", True),
        "Quark AdaQuant": ("U8S8_AAWS_ADAQUANT", False),
        "Quark AdaRound": ("U8S8_AAWS_ADAROUND", False),
    }
    return [
        Tool(name, version, partial(quantize_quark, source, config, per_channel, calibration), slow="_ADA" in config)
        for name, (config, per_channel) in settings.items()
    ]


def quantize_quark(source: Path, config: str, per_channel: bool, images: Floats, target: Path) -> None:
    """AMD Quark's ONNX quantization with one of its default configurations, whose weights have one scale per tensor."""
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    settings = get_default_config(config)
    settings.per_channel = per_channel
    quantizer = ModelQuantizer(Config(global_quant_config=settings))
    quantizer.quantize_model(str(source), str(target), calibration_reader(images))
