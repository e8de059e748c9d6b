"""The engine of rewrites: a rewrite is a function of a node that returns its replacement, or None for «no match»."""

from __future__ import annotations

import copy
import keyword
from collections.abc import Callable, Collection

from torch import fx, nn

from fxcurv.spec import module_of

__all__ = ["Rewrite", "copied", "free_target", "rewrites"]

Rewrite = Callable[[fx.Node, nn.Module], fx.Node | None]


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own that shares the modules of `gm`: passes change copies, never what they were given."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, values := {}))
    graph.output_node().meta = copy.copy(gm.graph.output_node().meta)
    for old, new in values.items():
        new.meta = copy.copy(old.meta)
    return fx.GraphModule(gm, graph, class_name=type(gm).__name__)


def rewrites(gm: fx.GraphModule, *rules: Rewrite) -> fx.GraphModule:
    """A copy of `gm` with every node replaced by what the first matching rule returns, from inputs to outputs."""
    gm = copied(gm)
    for node in list(gm.graph.nodes):
        if node.op != "call_module":
            continue
        for rule in rules:
            replacement = rule(node, module_of(node))
            if replacement is not None:
                node.replace_all_uses_with(replacement)
                gm.graph.erase_node(node)
                break
    return fx.GraphModule(gm, gm.graph, class_name=type(gm).__name__)


def free_target(path: str, taken: Collection[str]) -> str:
    """`path`, as `a_b` instead of `a.b` where `a` is a module already, and with a number behind it if it is taken."""
    while any(path.startswith(f"{t}.") for t in taken):
        parent, _, last = path.rpartition(".")
        path = f"{parent}_{last}"
    target, number = path, 0
    while _reserved(target.rpartition(".")[2]) or any(t == target or t.startswith(f"{target}.") for t in taken):
        number += 1
        target = f"{path}_{number}"
    return target


def _reserved(name: str) -> bool:
    """Whether no submodule can have this name in generated code."""
    return hasattr(fx.GraphModule, name) or keyword.iskeyword(name)
