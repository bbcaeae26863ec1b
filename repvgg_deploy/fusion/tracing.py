"""Blocks known by what they do: the forward is traced, and read as one affine value and what follows it.

So the names of a block's parts do not matter, nor how many branches it has: MobileOne's (several k×k branches, a scale
branch), the RepConv of YOLOv6 and YOLOv7, blocks with a large and a small kernel, blocks of one's own.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repvgg_deploy.fusion.algebra import (
    Affine,
    Convolved,
    Input,
    Normalized,
    Scaled,
    Summed,
    is_norm,
    norms_of,
    require_one_convolution,
    sources_of,
)
from repvgg_deploy.fusion.blocks import BlockParts

_MOST_PARTS = 80
"""Modules in a block; MobileOne's with eight branches have half as many. Larger modules are never one block."""

# Two threads that trace at once would each take the other's replacement of `nn.Module.__call__` for the original.
_ONE_AT_A_TIME = threading.RLock()

_RELUS: tuple[object, ...] = (F.relu, torch.relu, "relu", "relu_", torch.relu_)
_ADDS: tuple[object, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_MULTIPLIES: tuple[object, ...] = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


def take_apart_by_tracing(block: nn.Module, name: str, fewest: int = 2) -> BlockParts | None:
    """The parts of a module that sums branches of its input, whatever their names; None for any other module.

    `fewest` branches, one of them a convolution, all affine in the input without mixing pixels otherwise; then
    anything that reads the sum alone.

    Raises:
        FusionError: it is such a sum, and has no equivalent convolution.
    """
    if not 2 <= sum(1 for _ in block.modules()) <= _MOST_PARTS or not _may_sum(block):
        return None
    # The structure is copied, the tensors are shared: so the block's mode can be changed, and nothing is duplicated.
    tensors = [*block.parameters(), *block.buffers()]
    twin = copy.deepcopy(block, {id(tensor): tensor for tensor in tensors}).eval()
    traced = _trace(twin, {})
    if traced is None:
        return None
    graph, values = traced
    root = _last_affine(graph, values)
    if root is None:
        return None
    value = values[root]
    sources = list(sources_of(value))
    if len(sources) < fewest or all(conv is None for conv in sources):
        return None
    rest = _rest(twin, graph, root)
    if rest is None or _is_of_one_child(twin, value):
        return None
    require_one_convolution(value, name)
    return BlockParts(value, *rest)


def _is_of_one_child(block: nn.Module, value: Affine) -> bool:
    """Whether one submodule of `block` has the whole of `value`: then that is the block, and this is around it."""
    convs = sum(conv is not None for conv in sources_of(value))
    parts = convs + sum(1 for _ in norms_of(value))
    for child in block.children():
        inner = _trace(child, {}) if _may_sum(child) else None
        root = None if inner is None else _last_affine(*inner)
        if inner is not None and root is not None:
            found = inner[1][root]
            sources = list(sources_of(found))
            if len(sources) > 1 and parts == sum(c is not None for c in sources) + sum(1 for _ in norms_of(found)):
                return True
    return False


def _may_sum(block: nn.Module) -> bool:
    parts = list(block.modules())
    return (
        any(isinstance(p, nn.Conv2d) for p in parts) and sum(isinstance(p, nn.Conv2d) or is_norm(p) for p in parts) > 1
    )


class _Tracer(fx.Tracer):
    """Looks into those submodules whose output is affine in their input; all others stay as they are."""

    def __init__(self, known: dict[int, bool]) -> None:
        super().__init__()
        self._known = known
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As torch's own, for the modules of what is traced; those that other threads run meanwhile just run.

        Tracing replaces `nn.Module.__call__` for the whole process while it lasts.
        """
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As torch's own for what is traced, see `call_module`; the tensors are shared with nets that run elsewhere."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d) or is_norm(m) or super().is_leaf_module(m, module_qualified_name):
            return True
        if id(m) not in self._known:
            traced = _trace(m, self._known)
            self._known[id(m)] = traced is not None and _is_affine(*traced)
        return not self._known[id(m)]


def _trace(module: nn.Module, known: dict[int, bool]) -> tuple[fx.Graph, dict[fx.Node, Affine]] | None:
    """The graph of a module's forward, and which of its values are affine; None if it cannot be traced."""
    try:
        with _ONE_AT_A_TIME:
            graph = _Tracer(known).trace(module)
    except Exception:
        # The forward is user code, run on placeholders, so it can raise any exception.
        return None
    _erase_unread(graph)
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        return None
    values: dict[fx.Node, Affine] = {}
    constants: dict[fx.Node, Tensor] = {}
    for node in graph.nodes:
        constant = _read_constant(module, node, constants)
        if constant is not None:
            constants[node] = constant
            continue
        value = _read(module, node, values, constants)
        if value is not None:
            values[node] = value
    return graph, values


def _erase_unread(graph: fx.Graph) -> None:
    """Leave out what does not reach the output; torch's own `eliminate_dead_code` wants a GraphModule."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("output", "placeholder"):
            graph.erase_node(node)


def _read_constant(module: nn.Module, node: fx.Node, constants: dict[fx.Node, Tensor]) -> Tensor | None:
    """A parameter or buffer, or one in another shape."""
    if node.op == "get_attr":
        found = operator.attrgetter(str(node.target))(module)
        return found if isinstance(found, Tensor) else None
    if node.op == "call_method" and node.target in ("view", "reshape", "unsqueeze") and node.args[0] in constants:
        sizes = node.args[1:]
        if all(isinstance(size, int) for size in sizes):
            return cast(Tensor, getattr(constants[cast(fx.Node, node.args[0])], str(node.target))(*sizes))
    return None


def _is_affine(graph: fx.Graph, values: dict[fx.Node, Affine]) -> bool:
    (output,) = graph.find_nodes(op="output")
    return output.args[0] in values


def _read(
    module: nn.Module, node: fx.Node, values: dict[fx.Node, Affine], constants: dict[fx.Node, Tensor]
) -> Affine | None:
    if node.op == "placeholder":
        return Input()
    inputs = [values.get(given) for given in node.all_input_nodes]
    if node.op == "call_module" and len(inputs) == 1 and inputs[0] is not None:
        return _apply(module.get_submodule(str(node.target)), inputs[0])
    if node.op in ("call_function", "call_method") and not node.kwargs and len(node.args) == 2:
        if node.target in _ADDS:
            return _add(node.args, values)
        if node.target in _MULTIPLIES:
            return _multiply(node.args, values, constants)
    return None


def _apply(part: nn.Module, value: Affine) -> Affine | None:
    if isinstance(part, nn.Conv2d):
        return Convolved(part) if isinstance(value, Input) else None
    if type(part) in (nn.Identity, nn.Dropout, nn.Dropout2d):
        return value
    return Normalized(value, part) if is_norm(part) else None


def _add(arguments: Sequence[Any], values: dict[fx.Node, Affine]) -> Affine | None:
    # An absent branch counts as the number 0.
    given = [argument for argument in arguments if not (isinstance(argument, int | float) and argument == 0)]
    parts = [values.get(argument) if isinstance(argument, fx.Node) else None for argument in given]
    if any(part is None for part in parts):
        return None
    flat = [p for part in parts if part for p in (part.values if isinstance(part, Summed) else (part,))]
    return flat[0] if len(flat) == 1 else Summed(tuple(flat))


def _multiply(
    arguments: Sequence[Any], values: dict[fx.Node, Affine], constants: dict[fx.Node, Tensor]
) -> Affine | None:
    for first, second in (arguments, arguments[::-1]):
        value = values.get(first) if isinstance(first, fx.Node) else None
        factor = constants.get(second) if isinstance(second, fx.Node) else None
        # One per channel, or one for all.
        if (
            value is not None
            and factor is not None
            and (factor.numel() == 1 or (factor.dim() >= 3 and factor.shape[-3] == factor.numel()))
        ):
            return Scaled(value, factor)
    return None


def _last_affine(graph: fx.Graph, values: dict[fx.Node, Affine]) -> fx.Node | None:
    """The last value of the graph that is affine in the input and more than the input itself."""
    found = [node for node in graph.nodes if node in values and node.op not in ("placeholder", "get_attr")]
    return found[-1] if found else None


def _rest(twin: nn.Module, graph: fx.Graph, root: fx.Node) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """What follows `root` as (before the activation, activation, after it); None if it reads anything else."""
    nodes = list(graph.nodes)
    behind = nodes[nodes.index(root) + 1 : -1]
    available = {root}
    for node in behind:
        if not all(given in available or given.op == "get_attr" for given in node.all_input_nodes):
            return None
        available.add(node)
    (result,) = nodes[-1].all_input_nodes or (None,)
    if result not in available or nodes[-1].args[0] is not result:
        return None
    chain = _as_chain(twin, behind, root, result)
    if chain is None:
        return nn.Identity(), _as_graph_module(twin, behind, root, result), nn.Identity()
    middle = next((i for i, part in enumerate(chain) if isinstance(part, nn.ReLU)), 0 if len(chain) == 1 else None)
    if middle is None:
        return nn.Identity(), _in_sequence(chain), nn.Identity()
    return _in_sequence(chain[:middle]), chain[middle], _in_sequence(chain[middle + 1 :])


def _as_chain(twin: nn.Module, nodes: list[fx.Node], root: fx.Node, result: fx.Node) -> list[nn.Module] | None:
    """`nodes` as modules of which each reads the one before; None if they are not that."""
    chain: list[nn.Module] = []
    last = root
    for node in nodes:
        if (
            node.op == "get_attr"
            or node.all_input_nodes != [last]
            or node.kwargs.get("inplace") not in (None, True, False)
        ):
            return None
        if node.op == "call_module" and len(node.args) == 1:
            chain.append(copy.deepcopy(twin.get_submodule(str(node.target))))
        elif node.target in _RELUS:
            chain.append(nn.ReLU())
        else:
            return None
        last = node
    return chain if last is result else None


def _in_sequence(parts: list[nn.Module]) -> nn.Module:
    kept = [part for part in parts if type(part) is not nn.Identity]
    return nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)


def _as_graph_module(twin: nn.Module, nodes: list[fx.Node], root: fx.Node, result: fx.Node) -> nn.Module:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {root: graph.placeholder("x")}
    parameters = [node for node in root.graph.nodes if node.op == "get_attr" and node not in nodes]
    for node in [*parameters, *nodes]:
        copied[node] = graph.node_copy(node, lambda given: copied[given])
    graph.output(copied[result])
    _erase_unread(graph)
    return cast(nn.Module, copy.deepcopy(fx.GraphModule(twin, graph, "AfterSum")))
