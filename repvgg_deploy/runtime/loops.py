"""Graphs with loops: how often they repeat, as far as the graph says so, and an end to runs that have none.

An image classifier needs no loop, but other models that are run here have short ones. A graph of a stranger can ask for
any number of iterations, and nothing can interrupt ONNX Runtime meanwhile, not even Ctrl-C.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Timer
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper

from repvgg_deploy.errors import GraphError
from repvgg_deploy.files.printable import printable
from repvgg_deploy.graphs.serialization import read_skeleton

MOST_ITERATIONS = 1 << 20
"""Of one loop with those around it, per run: an empty iteration takes ONNX Runtime some microseconds."""
RUN_SECONDS = 300.0
"""What a run of a graph with loops may take; a graph without any always ends."""

_HINT = "no image classifier needs that; `timeout` ends a command that takes too long"

_Constants = ChainMap[str, TensorProto]


@dataclass(frozen=True)
class Loops:
    """Whether a graph has loops, and the one that repeats most: `iterations` of `name`, infinite if it has no end.

    Only what the graph itself says is counted: a loop whose length is computed counts once, with what is in it.
    """

    found: bool = False
    iterations: float = 0
    name: str = ""

    def joined(self, other: Loops) -> Loops:
        """Of both graphs together."""
        most = max(self, other, key=lambda loops: loops.iterations)
        return Loops(self.found or other.found, most.iterations, most.name)

    def require_short(self, path: object) -> None:
        """Raise GraphError if a loop repeats too often to be run.

        Raises:
            GraphError: it names `path` and the loop.
        """
        if self.iterations > MOST_ITERATIONS:
            often = "without end" if self.iterations == math.inf else f"{self.iterations:,.0f} times"
            raise GraphError(f"{path} repeats the node {printable(self.name)} {often}", _HINT)


def find_loops(graph: Path | onnx.ModelProto) -> Loops:
    """The loops of a graph, those in other graphs' branches and in functions too; none if the file is not a graph."""
    try:
        model = read_skeleton(graph) if isinstance(graph, Path) else graph
    except GraphError:
        # The code that opens the file to run it reports what is wrong with it.
        return Loops()
    loops = _in_nodes(model.graph, ChainMap(_constants(model.graph)), 1)
    for function in model.functions:
        loops = loops.joined(_in_nodes(function, ChainMap({}), 1))
    return loops


def _in_nodes(graph: Any, known: _Constants, times: float) -> Loops:
    """The loops among the nodes of a graph or function that is run so many times."""
    loops = Loops()
    for node in graph.node:
        inside = times
        if node.op_type in ("Loop", "Scan"):
            inside = times * _length(node, known)
            loops = loops.joined(Loops(True, inside, node.name or next(iter(node.output), "")))
        for body in _bodies(node):
            loops = loops.joined(_in_nodes(body, known.new_child(_constants(body)), inside))
    return loops


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _constants(graph: GraphProto) -> dict[str, TensorProto]:
    """What a graph says of single values, by name."""
    found = {item.name: item for item in graph.initializer if math.prod(item.dims) == 1}
    for node in graph.node:
        if node.op_type == "Constant" and len(node.output) == 1:
            for attribute in node.attribute:
                if attribute.name == "value" and math.prod(attribute.t.dims) == 1:
                    found[node.output[0]] = attribute.t
                elif attribute.name == "value_int":
                    found[node.output[0]] = TensorProto(data_type=TensorProto.INT64, int64_data=[attribute.i])
    return found


def _length(node: NodeProto, known: _Constants) -> float:
    """How often a loop runs its body, 1 where the graph does not say; a Scan's length is that of a tensor in memory."""
    if node.op_type == "Scan":
        return 1
    trips, condition = (*node.input, "", "")[:2]
    if not all(_never_stops(body, known) for body in _bodies(node)):
        # Exporters write `while` as a loop of 2⁶³ − 1 iterations that a computed condition ends.
        return 1
    if trips:
        found = _value(known.get(trips))
        return 1 if found is None else max(0.0, float(found))
    return math.inf if not condition or _value(known.get(condition)) == 1 else 1


def _never_stops(body: GraphProto, known: _Constants) -> bool:
    """Whether a loop's condition is always true: a constant, or the one that it begins with."""
    if not body.output or len(body.input) < 2:
        return False
    name, inside = body.output[0].name, known.new_child(_constants(body))
    copied = {node.output[0]: node.input[0] for node in body.node if node.op_type == "Identity" and node.input}
    for _ in copied:
        name = copied.get(name, name)
    return name == body.input[1].name or _value(inside.get(name)) == 1


def _value(tensor: TensorProto | None) -> int | None:
    # Whatever a damaged tensor makes of it, ONNX Runtime has its own words for that.
    with suppress(Exception):
        if tensor is not None and tensor.data_location != TensorProto.EXTERNAL:
            return int(numpy_helper.to_array(tensor).item())
    return None


@contextmanager
def ending_runs(options: Any, path: object, loops: Loops) -> Iterator[None]:
    """In the block, a run with these `RunOptions` of a graph with loops ends after `RUN_SECONDS`.

    Raises:
        GraphError: it was ended.
    """
    if not loops.found:
        yield
        return
    ended = Event()

    def end() -> None:
        ended.set()
        options.terminate = True

    timer = Timer(RUN_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if not ended.is_set():
            raise
        raise GraphError(f"{path} has loops, and a run had not ended after {RUN_SECONDS:g} s", _HINT) from error
    finally:
        timer.cancel()
