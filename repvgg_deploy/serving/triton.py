"""`config.pbtxt`: what Triton Inference Server is told of a model, of its preprocessing, and of both in a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from repvgg_deploy.errors import DeployError

Device = Literal["auto", "cpu", "gpu"]
Backend = Literal["onnxruntime", "tensorrt"]

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
LABELS_FILE = "labels.txt"
FILE_NAMES: Mapping[Backend, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
"""What Triton looks for in the folder of a version."""


@dataclass(frozen=True)
class ServedTensor:
    """An input or output as a request sees it: `dtype` in NumPy's words, -1 for a dimension of any size.

    Attributes:
        shape: with the batch, which is -1 where requests are batched.
        has_labels: an output with one score per class.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    has_labels: bool = False


@dataclass(frozen=True)
class ServedModel:
    """What one `config.pbtxt` says.

    Attributes:
        max_batch: 0 for a model that takes the shapes of its tensors as they are.
        preferred: batch sizes that requests are collected to.
        plans: files by compute capability, where there are several.
        cuda_graphs: record the kernels of a batch as a CUDA graph (TensorRT).
    """

    name: str
    backend: Backend
    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]
    max_batch: int = 0
    preferred: tuple[int, ...] = ()
    queue_delay_us: int = 100
    instances: int = 1
    device: Device = "auto"
    plans: Mapping[str, str] = field(default_factory=dict)
    warm_up: bool = True
    cuda_graphs: bool = False

    def head(self) -> str:
        """What the clients and the files of every version depend on."""
        lines = [
            f"name: {_quote(self.name)}",
            f"backend: {_quote(self.backend)}",
            f"max_batch_size: {self.max_batch}",
            *_tensors("input", self.inputs, self.max_batch > 0),
            *_tensors("output", self.outputs, self.max_batch > 0),
        ]
        if self.plans:
            for capability, file in sorted(self.plans.items()):
                lines += ["cc_model_filenames {", f"  key: {_quote(capability)}", f"  value: {_quote(file)}", "}"]
        else:
            lines.append(f"default_model_filename: {_quote(FILE_NAMES[self.backend])}")
        return "\n".join(lines) + "\n"

    def to_pbtxt(self) -> str:
        """The whole file, in protobuf's text format."""
        lines = ["instance_group {", f"  count: {self.instances}", f"  kind: KIND_{self.device.upper()}", "}"]
        if self.max_batch > 1:
            lines.append("dynamic_batching {")
            lines += [f"  preferred_batch_size: {size}" for size in self.preferred]
            lines += [f"  max_queue_delay_microseconds: {self.queue_delay_us}", "}"]
        if self.cuda_graphs:
            lines += ["optimization {", "  cuda {", "    graphs: true", "  }", "}"]
        sizes = sorted({1, *self.preferred}) if self.max_batch > 0 else [1]
        for size in sizes if self.warm_up else ():
            lines += _warm_up(self.inputs, size, self.max_batch > 0)
        return self.head() + "\n".join(lines) + "\n"


@dataclass(frozen=True)
class ServedEnsemble:
    """Two models in a row: what the first gives is what the second takes. One image per request."""

    name: str
    first: ServedModel
    second: ServedModel

    def head(self) -> str:
        """The whole file: nothing in it is anybody's choice."""
        return self.to_pbtxt()

    def to_pbtxt(self) -> str:
        """The whole file, in protobuf's text format."""
        outputs = [replace(output, shape=(1, *output.shape[1:])) for output in self.second.outputs]
        lines = [
            f"name: {_quote(self.name)}",
            'platform: "ensemble"',
            # Images of different sizes cannot be one batch.
            "max_batch_size: 0",
            *_tensors("input", self.first.inputs, False),
            *_tensors("output", outputs, False),
            "ensemble_scheduling {",
            *_step(self.first, {}),
            *_step(self.second, {output.name: output.name for output in outputs}),
            "}",
        ]
        return "\n".join(lines) + "\n"


def _step(model: ServedModel, outputs: Mapping[str, str]) -> list[str]:
    """One step of an ensemble; what is not among its `outputs` has a name of its own between the steps."""
    # -1 is the newest version: an ensemble follows its models.
    lines = ["  step {", f"    model_name: {_quote(model.name)}", "    model_version: -1"]
    inside = {"input_map": model.inputs, "output_map": model.outputs}
    for field_name, tensors in inside.items():
        for tensor in tensors:
            value = outputs.get(tensor.name, tensor.name)
            lines += [
                f"    {field_name} {{",
                f"      key: {_quote(tensor.name)}",
                f"      value: {_quote(value)}",
                "    }",
            ]
    return [*lines, "  }"]


def _tensors(kind: str, tensors: Sequence[ServedTensor], batched: bool) -> list[str]:
    lines = []
    for tensor in tensors:
        dims = tensor.shape[1:] if batched else tensor.shape
        lines += [
            f"{kind} {{",
            f"  name: {_quote(tensor.name)}",
            f"  data_type: {triton_type(tensor)}",
            f"  dims: [ {', '.join(map(str, dims))} ]",
            *([f"  label_filename: {_quote(LABELS_FILE)}"] if tensor.has_labels else []),
            "}",
        ]
    return lines


def triton_type(tensor: ServedTensor) -> str:
    """Triton's name of the type.

    Raises:
        DeployError: it is none that these models have.
    """
    if tensor.dtype not in _TYPES:
        raise DeployError(f"{tensor.name} has the type {tensor.dtype}", f"one of: {', '.join(_TYPES)}")
    return _TYPES[tensor.dtype]


# An image as large as a camera's thumbnail: a dimension of any size needs one to be warmed up with.
_SOME_PIXELS = 512


def _warm_up(inputs: Sequence[ServedTensor], size: int, batched: bool) -> list[str]:
    lines = ["model_warmup {", f'  name: "batch_{size}"', f"  batch_size: {size}"]
    for tensor in inputs:
        dims = tensor.shape[1:] if batched else tensor.shape
        shown = ", ".join(str(_SOME_PIXELS if dim < 0 else dim) for dim in dims)
        lines += [
            "  inputs {",
            f"    key: {_quote(tensor.name)}",
            "    value {",
            f"      data_type: {triton_type(tensor)}",
            f"      dims: [ {shown} ]",
            "      zero_data: true",
            "    }",
            "  }",
        ]
    return [*lines, "}"]


def _quote(text: str) -> str:
    # Protobuf's text format and JSON escape the same characters in the same way, up to \u, which has no place here.
    return json.dumps(text, ensure_ascii=False)


def make_labels(names: Sequence[str]) -> str:
    """`labels.txt`: a class per line."""
    return "".join(f"{' '.join(name.split())}\n" for name in names)
