"""ONNX graphs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.artifacts import Array
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.graphs.serialization import read_skeleton
from repvgg_deploy.hardware.cpu import core_limit
from repvgg_deploy.runtime.failures import first_line, is_graph_failure, require_readable
from repvgg_deploy.runtime.loops import ending_runs, find_loops
from repvgg_deploy.runtime.saturation import EXACT, find_saturating_layers, has_integers, saturates_here

_CUDA = "CUDAExecutionProvider"
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
"""Of the inputs of the graphs that this project writes."""

# FP32 without TF32, as in torch; channels last, which tensor cores take without a copy; kernels enqueued by one graph.
_CUDA_OPTIONS = {"use_tf32": "0", "prefer_nhwc": "1", "enable_cuda_graph": "1"}
# The run option that selects a captured graph; -1 runs without capturing or replaying one.
_GRAPH_OF_A_RUN = "gpu_graph_id"
_NO_GRAPH = "-1"

_CLASSIFIER = "an image classifier has one output N,classes"
_INSTALL = "install what that provider needs, or leave it out; see `repvgg-deploy doctor`"


class OnnxRunner:
    """An ONNX file in ONNX Runtime, on the requested provider and on no other.

    Attributes:
        metadata: the `metadata_props` of the graph.
        saturating: the layers whose sums may saturate on this CPU; none on most CPUs and in graphs of this project.
        exact_integers: those layers are run with exact sums.
        input_shape: of the input, None if a dimension is dynamic.
        input_type: as ONNX Runtime names it, for example `tensor(float)`.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "CPUExecutionProvider",
        threads: int = 0,
        quick_start: bool = False,
        exact_integers: bool = False,
        spinning: bool = False,
    ) -> None:
        """Open `path`; with `quick_start` for a few runs, by mapping the weights instead of copying them.

        The copy in ONNX Runtime's own layout makes a run faster, and costs more time than a few runs take.
        `exact_integers`: where this CPU's integer kernels may saturate on the graph, take slower ones that do not.
        `threads` is by default one per core, in a container one per core that its share is worth. With `spinning` they
        keep their cores busy while they wait for work, as is usual in ONNX Runtime: a run of a small net is shorter by
        microseconds per layer, and whatever else runs meanwhile, such as threads that decode images, gets less.
        """
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or core_limit() or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        require_readable(path)
        model: str | bytes = str(path)
        if quick_start:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            # The skeleton names the file of its weights without a folder, and bytes have none.
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            # Without the last level of optimization, whose layouts take copies of all weights.
            model = read_skeleton(path).SerializeToString()
        options.log_severity_level = 4
        self._path = path
        self._loops = find_loops(path)
        self._loops.require_short(path)
        on_cpu = provider == "CPUExecutionProvider"
        if provider == _CUDA and has_integers(path):
            # It would run the convolutions in float, each after a conversion.
            raise DeployError(
                f"ONNX Runtime has no integer convolutions for CUDA, so {path} would run in float there",
                "take an fp16 graph there, or TensorRT for INT8",
            )
        self.saturating = find_saturating_layers(path) if on_cpu and saturates_here() else ()
        self.exact_integers = exact_integers and bool(self.saturating)
        if self.exact_integers:
            options.add_session_config_entry(*EXACT)
        providers = choose_providers(runtime, provider)
        if not on_cpu:
            # A node that the provider cannot take fails the session, instead of running on the CPU silently.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            _load_cuda(runtime)
        self._runtime = runtime
        self._graphs = 0
        try:
            # After a failure Python's side of ONNX Runtime would try once more, with other providers.
            self._session = runtime.InferenceSession(model, options, providers=providers, enable_fallback=0)
        except Exception as error:
            if not is_graph_failure(error):
                raise
            raise _explain(error, path, provider) from error
        first = self._session.get_providers()[0]
        if first != provider:
            raise DeployError(
                f"{provider} of ONNX Runtime does not load here; {path} would have run on {first} instead", _INSTALL
            )
        self.backend = "onnxruntime-" + provider.removesuffix("ExecutionProvider").lower()
        self.backend_version: str = runtime.__version__
        try:
            self._describe(path)
        except UnicodeDecodeError as error:
            raise GraphError(f"{path} has names that are not UTF-8", "export it again") from error

    def _describe(self, path: Path) -> None:
        self.metadata: Mapping[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.precision = self.metadata.get("repvgg_deploy.precision", "unknown")
        (first_input,) = self._inputs(path)
        self.input_name: str = first_input.name
        self.input_type: str = first_input.type
        self.input_shape = tuple(size if isinstance(size, int) else None for size in first_input.shape)
        outputs = self._session.get_outputs()
        if not outputs:
            raise GraphError(f"{path} has no output", _CLASSIFIER)
        self.output_names: tuple[str, ...] = tuple(output.name for output in outputs)
        self.output_types = {output.name: str(output.type) for output in outputs}
        self.output_shapes = [tuple(s if isinstance(s, int) else None for s in output.shape) for output in outputs]

    def _inputs(self, path: Path) -> Sequence[Any]:
        inputs = list(self._session.get_inputs())
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise GraphError(f"{path} does not take one batch of images", "an image classifier has one input N,C,H,W")
        if 0 in inputs[0].shape:
            size = "x".join(map(str, inputs[0].shape))
            raise GraphError(f"{path} takes inputs of {size}, which are empty", "export it with another batch")
        return inputs

    @property
    def batch(self) -> int | None:
        """The one batch that the graph takes, or None for any."""
        return self.input_shape[0]

    def run(self, images: Array) -> dict[str, Array]:
        """The outputs by name for a batch of images as the graph declares its input.

        Raises:
            GraphError: the graph cannot be run on them, or gives something else than a row of numbers per image.
        """
        options = self._run_options(_NO_GRAPH)
        with self._explaining(images), ending_runs(options, self._path, self._loops):
            values = self._session.run(None, {self.input_name: images}, options)
        for name, value in zip(self.output_names, values, strict=True):
            if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
                raise GraphError(f"the output {name} of {self._path} is not of numbers", _CLASSIFIER)
            if value.shape[:1] != (len(images),) or value.size == 0:
                shape = "x".join(map(str, value.shape)) or "no dimensions"
                raise GraphError(
                    f"the output {name} of {self._path} has {shape}, where {len(images)} images were given", _CLASSIFIER
                )
        return dict(zip(self.output_names, values, strict=True))

    def bind(self, images: Array) -> BoundRun:
        """`images` in the memory of the device, ready to be run again and again; on CUDA as a graph of its own.

        Raises:
            GraphError: the graph cannot be run on them.
        """
        # Tells the shapes of the outputs, and prepares the kernels before anything is captured.
        outputs = self.run(images)
        self._graphs += 1
        device = "cuda" if self.backend == "onnxruntime-cuda" else "cpu"
        with self._explaining(images):
            binding = _Binding(self._runtime, self._session, device)
            bound = BoundRun(binding, self.input_name, images, outputs, self._run_options(str(self._graphs)))
            bound.run()
        return bound

    def _run_options(self, graph: str) -> Any:
        options = self._runtime.RunOptions()
        options.log_severity_level = 4
        if self.backend == "onnxruntime-cuda":
            # A graph holds for one shape and one set of addresses, those of `bind`.
            options.add_run_config_entry(_GRAPH_OF_A_RUN, graph)
        return options

    @contextmanager
    def _explaining(self, images: Array) -> Iterator[None]:
        """Inside the block ONNX Runtime's failures are the project's, with the input that was given."""
        try:
            yield
        except Exception as error:
            if not is_graph_failure(error):
                raise
            raise _explain_run(error, self._path, images) from error


@dataclass(frozen=True)
class _Binding:
    """What a run with bound memory needs of ONNX Runtime."""

    runtime: Any
    session: Any
    device: str

    def place(self, values: Array) -> Any:
        """`values` in the memory of the device."""
        return self.runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values), self.device, 0)


class BoundRun:
    """One batch whose input and outputs stay where they are on the device; see `OnnxRunner.bind`."""

    def __init__(
        self, binding: _Binding, name: str, images: Array, outputs: Mapping[str, Array], run_options: Any
    ) -> None:
        self._session, self._options = binding.session, run_options
        self._host = np.ascontiguousarray(images)
        self._images = binding.place(images)
        self._outputs = {output: binding.place(values) for output, values in outputs.items()}
        self._bound = binding.session.io_binding()
        self._bound.bind_ortvalue_input(name, self._images)
        for output, value in self._outputs.items():
            self._bound.bind_ortvalue_output(output, value)

    def upload(self) -> None:
        """Copy the batch to the device once more."""
        self._images.update_inplace(self._host)

    def run(self) -> None:
        """One run, from its begin to its end; no copies between host and device."""
        self._session.run_with_iobinding(self._bound, self._options)

    def download(self) -> dict[str, Array]:
        """The outputs by name, copied to the host."""
        return {name: value.numpy() for name, value in self._outputs.items()}


def _explain_run(error: Exception, path: Path, images: Array) -> DeployError:
    said = first_line(error)
    what = f"an input of {'x'.join(map(str, images.shape))} {images.dtype}"
    if isinstance(error, MemoryError) or any(word in str(error) for word in ("bad_alloc", "Failed to allocate memory")):
        return GraphError(f"there is too little memory to run {path} on {what}", "a smaller batch")
    return GraphError(f"{path} cannot be run on {what}: {said}", "`inspect` shows which input the graph takes")


def _explain(error: Exception, path: Path, provider: str) -> DeployError:
    if isinstance(error, UnicodeDecodeError):
        return GraphError(f"{path} has names that are not UTF-8", "export it again")
    said = first_line(error)
    if "default CPU EP" in said:
        # A provider whose libraries are missing is left out of the session, which then finds the CPU's alone.
        return DeployError(
            f"{provider} of ONNX Runtime does not load here, or lacks an operator of {path}, "
            "which would have run on the CPU instead",
            _INSTALL,
        )
    return GraphError(f"ONNX Runtime does not load {path}: {said}", "check the file with `inspect`")


def _load_cuda(runtime: Any) -> None:
    """Let ONNX Runtime find the CUDA libraries of pip's nvidia packages, where this release (1.21 on) can be told."""
    if hasattr(runtime, "preload_dlls"):
        # It prints what is missing; the session says so in an error.
        with redirect_stdout(StringIO()):
            runtime.preload_dlls()


def choose_providers(runtime: Any, provider: str) -> list[Any]:
    """The providers of a session that is to run on `provider` alone.

    Raises:
        DeployError: the installed ONNX Runtime was built without it.
    """
    available = runtime.get_available_providers()
    if provider not in available:
        raise DeployError(
            f"this ONNX Runtime has no {provider}; it would have run on CPUExecutionProvider instead",
            f"it has {', '.join(available)}; pip install onnxruntime-gpu after removing onnxruntime",
        )
    return [(provider, _CUDA_OPTIONS) if provider == _CUDA else provider]


def import_onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        DeployError: the package is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DeployError(
            "ONNX Runtime is not installed, so no ONNX graph can be verified",
            "pip install onnxruntime, or onnxruntime-gpu for CUDA; never both",
        ) from error
    # What fails before a session has its options is printed, in colours, and raised all the same.
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime
