"""parameter_usage: the nodes through which each wanted parameter reaches the output, and its usage."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Literal

import networkx as nx
import torch
from torch import fx

from fxcurv.core.errors import FxcurvError
from fxcurv.core.shapes import resolve
from fxcurv.ir import ops
from fxcurv.ir.backward_ops import OutputPositions
from fxcurv.ir.declare import WeightUsage
from fxcurv.ir.nodes import module_of, output_of
from fxcurv.ir.rules import rule_of
from fxcurv.quantities.protocol import ParameterUsage

__all__ = [
    "Usages",
    "bending",
    "bottlenecks",
    "carrying",
    "inputs_layout_of",
    "layout_of",
    "parameter_uses",
    "refusals",
    "usage_of",
]


Role = Literal["weight", "bias", "value"]


Usages = dict[str, list[tuple[fx.Node, Role]]]
"""Parameter -> the nodes that hold it, and their slot."""


def parameter_uses(gm: fx.GraphModule, wanted: Iterable[str]) -> Usages:
    """Return the nodes through which each wanted parameter reaches the output, with its role."""
    wanted, reached, uses = set(wanted), reaching(gm), Usages()
    for node in gm.graph.nodes:
        for role in ("weight", "bias", "value"):
            source = node.meta.get("slots", {}).get(role)
            if source is not None and source.expression is None and source.names[0] in wanted and node in reached:
                uses.setdefault(source.names[0], []).append((node, role))
    return uses


def reaching(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes on which the output depends differentiably."""
    output = output_of(gm)
    return {output} | nx.ancestors(flow_of(gm), output)


def refusals(gm: fx.GraphModule, parameters: Iterable[str]) -> dict[str, FxcurvError]:
    """Return parameter -> its refusal: the first refused node on a path from the parameter to the output."""
    found: dict[str, FxcurvError] = {}
    refused = [node for node in gm.graph.nodes if "refusal" in node.meta]
    if not refused:
        return found
    flow, uses, reached = flow_of(gm), parameter_uses(gm, parameters), reaching(gm)
    for node in (node for node in reversed(refused) if node in reached):
        below = {node} | nx.ancestors(flow, node)
        found |= {name: node.meta["refusal"] for name in uses if any(user in below for user, _ in uses[name])}
    return found


def carrying(gm: fx.GraphModule, using: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes at which columns are needed: on a path from one that uses a wanted parameter to the output."""
    below = set[fx.Node]().union(*nx.bfs_layers(flow_of(gm), list(using)))
    return below & reaching(gm)


def bending(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes for which the model's output is not a piecewise linear function of the node's output."""
    flow, found = flow_of(gm), set[fx.Node]()
    for node in reversed(gm.graph.nodes):
        if any(user in found or rule_of(module_of(user)).nonlinear for user in flow[node]):
            found.add(node)
    return found


def bottlenecks(gm: fx.GraphModule, using: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes that every path from the first of these nodes to the output passes, in graph order."""
    using, output = set(using), output_of(gm)
    above = nx.immediate_dominators(flow_of(gm).reverse(copy=False), output)
    chain = [node for node in gm.graph.nodes if node in using and (node in above or node == output)][:1]
    while chain and chain[-1] != output:
        chain.append(above[chain[-1]])
    return chain


def flow_of(gm: fx.GraphModule) -> nx.DiGraph[fx.Node]:
    """Return node -> the consumers that are differentiable in it."""
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    flow.add_nodes_from(gm.graph.nodes)
    for node in gm.graph.nodes:
        if node.op == "call_module" and rule_of(module_of(node)).kind != "non_differentiable":
            # a node shared by all samples depends on none of them, unless it is refused for mixing them
            shared = node.meta["samples"] is None and "refusal" not in node.meta
            flow.add_edges_from((x, node) for x in node.all_input_nodes if not shared or x.meta["samples"] is None)
    return flow


def usage_of(name: str, uses: Usages, bent: Collection[fx.Node]) -> ParameterUsage:
    """Return a parameter's usage, from the layouts of its uses and the nodes `bent`: nonlinear after them."""
    layouts = [layout_of(node) for node, _ in uses[name]]
    node, role = uses[name][0]
    shape = tuple(getattr(module_of(node), role).shape)
    _, groups, outputs = layouts[0]
    roles = {role for _, role in uses[name]}
    matrix = _is_matrix(node) and len({layout[1:] for layout in layouts}) == 1 and roles == {"weight"}
    inputs = math.prod(shape) // (groups * outputs) if role == "weight" else 1
    positions = sum(layout[0] for layout in layouts)
    in_out = role == "weight" and _use_of(node).weight == "in_out"
    nonlinear = len(uses[name]) > 1 or node in bent
    return ParameterUsage(
        name, shape, groups, outputs, inputs, positions, matrix, _partner(name, uses), in_out, nonlinear
    )


def _use_of(node: fx.Node) -> WeightUsage:
    """Return the op's usage of its parameters."""
    usage = rule_of(module_of(node)).usage
    assert usage is not None
    return usage


def layout_of(node: fx.Node) -> tuple[int, int, int]:
    """Return the layout [s, g, o] of a use: positions, groups, outputs per group."""
    op = module_of(node)
    if isinstance(op, ops.Parameter):
        return 1, 1, op.value.numel()
    S = torch.empty(1, *resolve(node.meta["shape"], 1), device="meta")
    s, g, o = OutputPositions(op, node.meta["samples"])(S).shape[2:]
    return s, g, o


def inputs_layout_of(node: fx.Node) -> tuple[int, int, int]:
    """Return the layout [s, g, i] of the input of a use of a weight: positions, groups, inputs per group."""
    s, g, o = layout_of(node)
    return s, g, getattr(module_of(node), "weight").numel() // (g * o)  # noqa: B009


def _partner(name: str, uses: Usages) -> str | None:
    """Return the bias that exactly the uses of this matrix add, or for that bias the matrix."""
    nodes = [node for node, _ in uses[name]]
    for other in uses:
        weight, bias = (name, other) if uses[name][0][1] == "weight" else (other, name)
        roles = {role for _, role in uses[weight]} == {"weight"} and {role for _, role in uses[bias]} == {"bias"}
        if other != name and roles and [node for node, _ in uses[other]] == nodes:
            return other if _is_matrix(nodes[0]) else None
    return None


def _is_matrix(node: fx.Node) -> bool:
    """Whether the weight of a use maps several inputs to an output, rather than scaling them one by one."""
    op, usage = module_of(node), rule_of(module_of(node)).usage
    return usage is not None and usage.weight != "per_channel" and getattr(op, "weight").ndim > 1  # noqa: B009
