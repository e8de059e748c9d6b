"""common_subexpressions: common subexpression elimination of positions, sums and gathers.

The inputs of q, k and v, or of parallel branches, are the same positions, with one second moment. The indices of a
pooling layer, which its pullback needs, also give its output.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxcurv.contractions.statistic import Statistic
from fxcurv.convolution.patches import Patches
from fxcurv.core.identity import identity_of
from fxcurv.ir import ops
from fxcurv.ir.backward_ops import Gather, InputPositions, SaveForBackward
from fxcurv.ir.nodes import module_of
from fxcurv.ir.rewriting import copied, settled
from fxcurv.ir.rules import rule_of

__all__ = ["equal_calls", "gathers", "share"]


def share(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a forward or backward graph without repeated computations."""
    gm = copied(gm)
    equal_calls(gm)
    gathers(gm)
    return settled(gm)


def equal_calls(gm: fx.GraphModule) -> None:
    """Merge positions and sums that are equal calls, in place."""
    first: dict[object, fx.Node] = {}
    for node in list(gm.graph.nodes):
        key = _key(node)
        if key is not None and first.setdefault(key, node) is not node:
            node.replace_all_uses_with(first[key])
            gm.graph.erase_node(node)


def _key(node: fx.Node) -> object:
    """Return the key of a call of positions or of a sum; equal calls have equal keys."""
    op = module_of(node) if node.op == "call_module" else None
    if isinstance(op, InputPositions):
        return InputPositions, _reading(op.op), op.place, node.args
    if isinstance(op, Statistic):
        return identity_of(op), str(node.args)
    return None


def _reading(op: nn.Module) -> object:
    """Return all that an op's positions depend on, except the input."""
    if isinstance(op, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Patches.of(op)
    return nn.Linear if isinstance(op, nn.Linear | ops.MatMul) else op


def gathers(gm: fx.GraphModule) -> None:
    """Replace y = pool(x) and its indices by the indices, and y gathered by them, in place."""
    for saved in list(gm.graph.nodes):
        op: Any = module_of(saved) if saved.op == "call_module" else None
        if not isinstance(op, SaveForBackward) or op.rule.kind != "gather":
            continue
        y, x = saved.args
        gm.set_submodule(y.target, Gather(rule_of(op.op).axes))
        with gm.graph.inserting_before(y):
            indices = gm.graph.call_module(saved.target, (x, x))
            selected = gm.graph.call_module(y.target, (x, indices))
        indices.meta, selected.meta = dict(saved.meta), dict(y.meta)
        for old, new in ((saved, indices), (y, selected)):
            old.replace_all_uses_with(new)
            gm.graph.erase_node(old)
