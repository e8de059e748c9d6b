"""schedule: every sum is computed once its arguments exist, so that they are freed before the pullback continues."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from fxcurv.contractions.statistic import Statistic
from fxcurv.ir.backward_ops import InputPositions, OutputPositions, ParameterPositions, Rotate, SaveForBackward
from fxcurv.ir.nodes import module_of

__all__ = ["schedule"]


def schedule(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the same computation in another order: each pullback is followed by the sums that can then be computed.

    The generated code drops a tensor at its last use, so the order determines the peak memory.
    """
    needs: dict[fx.Node, set[fx.Node]] = {}
    due: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    last_input = gm.graph.find_nodes(op="placeholder")[-1]
    for node in gm.graph.nodes:
        beside = _is_beside(node)
        needs[node] = set().union(*(needs[x] for x in node.all_input_nodes)) if beside else {node}
        if beside and all(user.op == "output" for user in node.users):
            due[max({last_input} | needs[node], key=order.__getitem__)].append(node)
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (n for n in gm.graph.nodes if not _is_beside(n)):
        _emit(graph, node, values)
        for sink in due[node]:
            _emit(graph, sink, values)
    return fx.GraphModule(gm, graph, class_name=type(gm).__name__)


def _is_beside(node: fx.Node) -> bool:
    """Whether a node serves a sum, rather than being a step of the pullback."""
    return node.op == "call_module" and isinstance(
        module_of(node), Statistic | SaveForBackward | InputPositions | OutputPositions | ParameterPositions | Rotate
    )


def _emit(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, fx.Node]) -> None:
    """Copy a node after its arguments."""
    for x in node.all_input_nodes:
        if x not in values:
            _emit(graph, x, values)
    if node.op == "output":
        graph.output(fx.map_arg(node.args[0], values.__getitem__))
        return
    values[node] = graph.node_copy(node, values.__getitem__)
