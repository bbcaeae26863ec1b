"""ONNX graphs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_deploy.artifacts import Array
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.graphs.serialization import read_skeleton
from repvgg_deploy.runtime.saturation import EXACT, find_saturating_layers, saturates_here

_CUDA = "CUDAExecutionProvider"
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
"""Of the inputs of the graphs that this project makes."""

_INSTALL = "install what that provider needs, or leave it out; `repvgg-deploy doctor` tells more"


class OnnxRunner:
    """An ONNX file in ONNX Runtime, on the provider that was asked for and on no other.

    Attributes:
        metadata: the `metadata_props` of the graph.
        saturating: the layers whose sums may saturate on this CPU; none on most CPUs and in graphs of this project.
        exact_integers: those layers are run with exact sums.
        input_shape: of the input, None where a dimension is dynamic.
        input_type: as ONNX Runtime names it, for example `tensor(float)`.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "CPUExecutionProvider",
        threads: int = 0,
        quick_start: bool = False,
        exact_integers: bool = False,
    ) -> None:
        """Open `path`; with `quick_start` for a few runs, by mapping the weights in place of copying them.

        The copy in ONNX Runtime's own layout makes a run faster, and costs more time than a few runs take.
        `exact_integers`: where this CPU's integer kernels may saturate on the graph, take slower ones that do not.
        """
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        model: str | bytes = str(path)
        if quick_start:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            model = read_skeleton(path).SerializeToString()
        options.log_severity_level = 4
        on_cpu = provider == "CPUExecutionProvider"
        self.saturating = find_saturating_layers(path) if on_cpu and saturates_here() else ()
        self.exact_integers = exact_integers and bool(self.saturating)
        if self.exact_integers:
            options.add_session_config_entry(*EXACT)
        providers = choose_providers(runtime, provider)
        if not on_cpu:
            # A node that the provider cannot take fails the session, where it would run on the CPU in silence.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            _load_cuda(runtime)
        try:
            self._session = runtime.InferenceSession(model, options, providers=providers, enable_fallback=0)
        except Exception as error:
            # ONNX Runtime's exceptions share no base class but Exception.
            if type(error).__module__.split(".")[0] != "onnxruntime":
                raise
            raise _explain(error, path, provider) from error
        first = self._session.get_providers()[0]
        if first != provider:
            raise DeployError(
                f"{provider} of ONNX Runtime does not load here; {path} would have run on {first} instead", _INSTALL
            )
        self.backend = "onnxruntime-" + provider.removesuffix("ExecutionProvider").lower()
        self.backend_version: str = runtime.__version__
        self.metadata: Mapping[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.precision = self.metadata.get("repvgg_deploy.precision", "unknown")
        (first_input,) = self._inputs(path)
        self.input_name: str = first_input.name
        self.input_type: str = first_input.type
        self.input_shape = tuple(size if isinstance(size, int) else None for size in first_input.shape)
        outputs = self._session.get_outputs()
        self.output_names: tuple[str, ...] = tuple(output.name for output in outputs)
        self.output_shapes = [tuple(s if isinstance(s, int) else None for s in output.shape) for output in outputs]

    def _inputs(self, path: Path) -> Sequence[Any]:
        inputs = list(self._session.get_inputs())
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise GraphError(f"{path} does not take one batch of images", "an image classifier has one input N,C,H,W")
        return inputs

    @property
    def batch(self) -> int | None:
        """The one batch that the graph takes, or None for any."""
        return self.input_shape[0]

    def run(self, images: Array) -> dict[str, Array]:
        """The outputs by name for a batch of images as the graph declares its input."""
        values = self._session.run(None, {self.input_name: images})
        return dict(zip(self.output_names, values, strict=True))


def _explain(error: Exception, path: Path, provider: str) -> DeployError:
    said = str(error).splitlines()[0]
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
    """The providers of a session that is to run on `provider` alone; TensorRT's leaves what it lacks to CUDA.

    FP32 is without TF32 on CUDA, as it is in torch; ONNX Runtime's default is with it.

    Raises:
        DeployError: the installed ONNX Runtime was built without it.
    """
    available = runtime.get_available_providers()
    wanted = [provider, _CUDA] if provider == "TensorrtExecutionProvider" else [provider]
    if provider not in available:
        instead = next((name for name in wanted if name in available), "CPUExecutionProvider")
        raise DeployError(
            f"this ONNX Runtime has no {provider}; it would have run on {instead} instead",
            f"it has {', '.join(available)}; pip install onnxruntime-gpu after removing onnxruntime",
        )
    return [(name, {"use_tf32": "0"}) if name == _CUDA else name for name in wanted]


def import_onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        DeployError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DeployError(
            "ONNX Runtime is not installed, so no ONNX graph can be verified",
            "pip install onnxruntime, or onnxruntime-gpu for CUDA; never both",
        ) from error
    return onnxruntime
