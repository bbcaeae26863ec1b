"""From an ONNX file to a TensorRT network: parsed, and the precision of every convolution read from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.engine.backends import Backend
from repvgg_deploy.engine.log import collect_messages, explain_failure, first_line, get_logger
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.hardware.gpus import find_gpus
from repvgg_deploy.hardware.threads import run_cancellable

# trt.DataType by name: what a tensor is in NumPy's words.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "FP8": "fp8", "INT8": "int8"}


@dataclass(frozen=True)
class Tensor:
    """An input or output: `dtype` in NumPy's words, -1 for a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ParsedNetwork:
    """A network and what it was made with; the library needs all of them alive until the build is over."""

    builder: Any
    network: Any
    parser: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def images(self) -> Tensor:
        """The one input."""
        return self.inputs[0]


def create_builder(backend: Backend) -> Any:
    """The library's Builder.

    Raises:
        DeployError: the library needs a GPU and there is none, or does not support this one, or the driver is too old.
    """
    with collect_messages(backend) as messages:
        try:
            return backend.module.Builder(get_logger(backend))
        except TypeError as error:
            # pybind11's "factory function returned nullptr": the library could not start CUDA.
            found = find_gpus()
            if found.gpus:
                raise explain_failure(backend, "starting the engine builder", messages) from error
            why = found.reason or first_line(messages.errors)
            raise DeployError(
                f"{backend.label} cannot build engines here: {why}",
                "build on the machine that will run the engine, or use --engine tensorrt-rtx, which needs no GPU",
            ) from error


def parse_onnx(backend: Backend, path: Path, classifier: bool = True) -> ParsedNetwork:
    """The strongly typed network of an ONNX file: the types of its tensors are those of the graph.

    A `classifier` has one input, a batch of images of a fixed size; other networks may have any.

    Raises:
        GraphError: the library refuses the graph; each of its reasons is told with the node.
        DeployError: the library cannot build here.
    """
    trt = backend.module
    if not path.is_file():
        raise GraphError(f"there is no file {path}", "give the ONNX graph that `export` wrote")
    builder = create_builder(backend)
    with collect_messages(backend) as messages:
        # TensorRT 11 knows no other networks; 10 and TensorRT-RTX want the flag.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, get_logger(backend))
        if not run_cancellable(lambda: parser.parse_from_file(str(path))):
            raise _refused(backend, path, [parser.get_error(i) for i in range(parser.num_errors)], messages.errors)
    inputs = tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs))
    if classifier:
        _require_images(path, inputs)
    return ParsedNetwork(builder, network, parser, inputs, outputs)


def _refused(backend: Backend, path: Path, errors: list[Any], logged: list[str]) -> GraphError:
    lines = []
    for error in errors:
        node = f"node {error.node_name() or error.node()} ({error.node_operator()}): " if error.node() >= 0 else ""
        lines.append(node + error.desc().strip().replace("\n", " "))
    reasons = lines or [first_line(logged)]
    shown = "\n  ".join(reasons[:8]) + (f"\n  and {len(reasons) - 8} more" if len(reasons) > 8 else "")
    unsupported = any("UNSUPPORTED" in str(error.code()) for error in errors)
    hint = "this operator does not occur in a RepVGG; export the checkpoint again" if unsupported else "export it again"
    return GraphError(f"{backend.label} does not parse {path.name}: {shown}", hint)


def _tensor(tensor: Any) -> Tensor:
    return Tensor(tensor.name, DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower()), tuple(tensor.shape))


def _require_images(path: Path, inputs: tuple[Tensor, ...]) -> None:
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise GraphError(f"{path} does not take one batch of images", "an image classifier has one input N,C,H,W")
    if any(size < 0 for size in inputs[0].shape[1:]):
        raise GraphError(
            f"{path}: the input's shape {inputs[0].shape} is dynamic beyond the batch", "give --size when exporting"
        )


def read_convolution_precisions(backend: Backend, network: Any) -> dict[str, str]:
    """Precision by name of every convolution of a parsed network.

    It is `int8` where both the input and the kernel come out of a DequantizeLinear of INT8 values, else the type of
    the input tensor. This is what the library was told to use; without a GPU nothing shows which kernel it chose.
    """
    layer_type = backend.module.LayerType
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    producers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}

    def precision_of(tensor: Any) -> str:
        producer = producers.get(tensor.name)
        if producer is not None and producer.type == layer_type.DEQUANTIZE:
            tensor = producer.get_input(0)
        name = str(tensor.dtype.name)
        return _PRECISIONS.get(name, name.lower())

    found = {}
    for layer in layers:
        if layer.type != layer_type.CONVOLUTION:
            continue
        if layer.num_inputs == 1:
            # The kernel is a constant of the layer: of the type of what it reads, whatever made that.
            name = str(layer.get_input(0).dtype.name)
            found[layer.name] = _PRECISIONS.get(name, name.lower())
            continue
        sides = {precision_of(layer.get_input(i)) for i in range(2)}
        found[layer.name] = sides.pop() if len(sides) == 1 else "mixed"
    return found


def require_precision(precisions: dict[str, str], wanted: Precision) -> Counter[str]:
    """How many convolutions have which precision; they must have the one that the graph's metadata says.

    In an INT8 graph some may be in float by design (a squeeze-excite, layers that a recipe spares), but not all.

    Raises:
        GraphError: the precisions differ.
    """
    counts = Counter(precisions.values())
    if wanted is Precision.INT8:
        if not counts["int8"] or counts["mixed"]:
            raise GraphError(f"the graph's metadata say int8, but its convolutions are {dict(counts)}", "export again")
        return counts
    other = next((name for name, precision in precisions.items() if precision != str(wanted)), None)
    if other is not None:
        raise GraphError(
            f"the graph's metadata say {wanted}, but the convolution {other} is {precisions[other]}", "export again"
        )
    return counts
