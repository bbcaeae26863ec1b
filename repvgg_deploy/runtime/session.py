"""Any ONNX graph in ONNX Runtime on the CPU: several inputs and outputs of any shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from repvgg_deploy.artifacts import Array
from repvgg_deploy.errors import GraphError
from repvgg_deploy.runtime.failures import first_line, is_graph_failure, require_readable
from repvgg_deploy.runtime.loops import ending_runs, find_loops
from repvgg_deploy.runtime.onnxruntime import import_onnxruntime


class GraphSession:
    """A graph, ready to run.

    Attributes:
        inputs: their names.
        outputs: their names.
    """

    def __init__(self, graph: Path | onnx.ModelProto, optimized: bool = True) -> None:
        """Open a file or a graph in memory; without `optimized` every node is run as it stands, Q and DQ in float.

        Raises:
            GraphError: ONNX Runtime does not load it, or a loop in it is too long.
        """
        runtime = import_onnxruntime()
        if isinstance(graph, Path):
            require_readable(graph)
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        levels = runtime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        self._name = str(graph) if isinstance(graph, Path) else "the graph"
        self._loops = find_loops(graph)
        self._loops.require_short(self._name)
        source = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
        try:
            self._session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if not is_graph_failure(error):
                raise
            raise GraphError(f"ONNX Runtime does not load the graph: {first_line(error)}") from error
        self.inputs = tuple(item.name for item in self._session.get_inputs())
        self.outputs = tuple(item.name for item in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name.

        Raises:
            GraphError: the graph does not run on these inputs.
        """
        # New for each run: a run that was ended leaves them so.
        options = import_onnxruntime().RunOptions()
        options.log_severity_level = 4
        try:
            with ending_runs(options, self._name, self._loops):
                values = self._session.run(None, dict(feeds), options)
        except Exception as error:
            if not is_graph_failure(error):
                raise
            raise GraphError(f"the graph does not run: {first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))
