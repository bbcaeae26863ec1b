"""The check that nothing is left to simplify in a graph: what onnxsim makes of it is the same graph.

Importing onnxsim takes a third of a second, and more where it finds torch. So it runs in a process of its own, which is
started first and loads while this one imports torch and reads the checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from repvgg_deploy.errors import GraphError

if TYPE_CHECKING:
    import onnx

_SAME = b"same"
_NOT_NEEDED = ("torch", "sympy")
"""What onnxsim imports where it is installed, for its exporters and its reports of a model's cost, and does without
where it is not; both together take four times as long to import as all that simplifying needs."""


class SimplificationCheck:
    """onnxsim in a process of its own, ready for one graph; to be used in a `with` block, which ends the process."""

    def __init__(self) -> None:
        # The paths of this process, not those that a new one would search: the same packages are found.
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import answer; answer()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C in a terminal is for this process, which then ends the other one.
            start_new_session=True,
        )

    def __enter__(self) -> SimplificationCheck:
        """The check itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def submit(self, model: onnx.ModelProto) -> None:
        """Send a graph, whose weights may be declared as inputs, and return at once.

        A process that did not start well is noticed by `require`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(model.SerializeToString(deterministic=True))
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.stdin = None

    def require(self) -> None:
        """Wait for the answer about the graph that was submitted.

        Raises:
            GraphError: onnxsim would change the graph, or cannot be run.
        """
        answer, log = self._process.communicate()
        if answer != _SAME:
            lines = (answer or log).decode(errors="replace").strip().splitlines() or ["it ended without a result"]
            raise GraphError(f"the graph could not be checked by onnxsim: {lines[-1]}", "pip install onnxsim")


def answer() -> None:
    """What the other process does: import, read a graph, say whether onnxsim leaves it as it is."""
    import gc

    gc.disable()
    for name in _NOT_NEEDED:
        # Importing it fails then, as where it is not installed.
        sys.modules[name] = None  # type: ignore[assignment]
    import onnx
    import onnxsim  # noqa: F401

    content = sys.stdin.buffer.read()
    if content:
        difference = find_simplification(onnx.ModelProto.FromString(content))
        sys.stdout.buffer.write(_SAME if difference is None else difference.encode())


def find_simplification(model: onnx.ModelProto) -> str | None:
    """What onnxsim changes in `model`, as a text; None if it changes nothing."""
    import onnxsim

    # Without its own comparison by random inputs: the weights are inputs here as well, and the file itself is compared.
    simplified = onnxsim.simplify(model, check_n=0)[0]
    if _describe(model) == _describe(simplified):
        return None
    return f"{len(model.graph.node)} nodes become {len(simplified.graph.node)}"


def _describe(model: onnx.ModelProto) -> tuple[list[bytes], set[str]]:
    """The nodes, and the names of all that goes in and out: the order of declarations does not count."""
    graph = model.graph
    nodes = [node.SerializeToString(deterministic=True) for node in graph.node]
    return nodes, {item.name for items in (graph.input, graph.initializer, graph.output) for item in items}
