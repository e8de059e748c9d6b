"""contract: definitions become cheaper equal contractions where the graph shows that they may."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxcurv.contractions import Diagonal, DiagonalOfSinglePositions
from passes.rewrite import rewrites

__all__ = ["contract", "single_positions"]


def contract(gm: fx.GraphModule) -> fx.GraphModule:
    """A backward graph with the contractions that are always the cheapest."""
    return rewrites(gm, single_positions)


def single_positions(node: fx.Node, op: nn.Module) -> fx.Node | None:
    """(Σ_s S x)² with one use and one position s is S² x²: no per-sample entries are formed."""
    if type(op) is not Diagonal:
        return None
    Ss: Any = node.args[1]
    if len(Ss) != 1 or Ss[0].meta["shape"][2] != 1:
        return None
    gm = node.graph.owning_module
    assert gm is not None
    target = f"{node.target}_single"
    gm.add_submodule(target, DiagonalOfSinglePositions())
    with node.graph.inserting_before(node):
        replacement = node.graph.call_module(target, node.args)
    replacement.meta = dict(node.meta)
    return replacement
