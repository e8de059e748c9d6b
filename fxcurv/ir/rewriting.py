"""The engine of rewrites: a rewrite is a function of a node that returns its replacement, or None for no match."""

from __future__ import annotations

import copy
from collections.abc import Callable
from keyword import iskeyword
from typing import Any

from torch import fx, nn

from fxcurv.ir.nodes import module_of

__all__ = ["Lazy", "Rewrite", "Targets", "copied", "instead", "rewrites", "settled"]


Rewrite = Callable[[fx.Node, nn.Module], fx.Node | None]


class Lazy(fx.GraphModule):
    """A graph whose code is generated on first use: most graphs of a pipeline are never run or read."""

    def recompile(self) -> Any:
        """Discard the generated code."""
        self.__dict__.pop("_code", None)
        type(self).forward = Lazy.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().recompile()  # sets `forward` on the class of this object
        return self.forward(*args, **kwargs)

    @property
    def code(self) -> str:
        """The generated Python code."""
        if "_code" not in self.__dict__:
            super().recompile()
        return super().code


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy that shares the modules of `gm`: passes change copies, never their arguments."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))  # copies the meta of every node, too
    graph.output_node().meta = copy.copy(gm.graph.output_node().meta)
    return Lazy(gm, graph, class_name=type(gm).__name__)


def rewrites(gm: fx.GraphModule, *rules: Rewrite) -> fx.GraphModule:
    """Return a copy of `gm` with each node replaced by the result of the first matching rule, from inputs to outputs.

    Unused nodes are removed.
    """
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
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return settled(gm)


def instead(node: fx.Node, op: nn.Module, args: tuple[Any, ...]) -> fx.Node:
    """Insert a call of `op` in place of a node of a copy, under the node's target."""
    gm = node.graph.owning_module
    assert gm is not None
    gm.set_submodule(str(node.target), op)
    with node.graph.inserting_before(node):
        replacement = node.graph.call_module(str(node.target), args)
    replacement.meta = dict(node.meta)
    return replacement


def settled(gm: fx.GraphModule) -> fx.GraphModule:
    """Finish a copy: delete unused modules and regenerate its code."""
    gm.delete_all_unused_submodules()
    gm.recompile()
    return gm


class Targets:
    """Unique targets for the modules of a graph."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.parents: set[str] = set()

    def free(self, path: str) -> str:
        """Return `path`, as `a_b` instead of `a.b` if `a` is a module, and with a number appended if it is taken.

        An underscore is appended to a part that is a Python keyword.
        """
        path = ".".join(f"{part}_" if iskeyword(part) else part for part in path.split("."))
        while not self.taken.isdisjoint(_parents(path)):
            parent, _, last = path.rpartition(".")
            path = f"{parent}_{last}"
        target, number = path, 0
        while hasattr(fx.GraphModule, target.rpartition(".")[2]) or target in self.taken or target in self.parents:
            number += 1
            target = f"{path}_{number}"
        self.taken.add(target)
        self.parents.update(_parents(target))
        return target


def _parents(path: str) -> list[str]:
    """Parents of a path: a.b.c -> a, a.b."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
