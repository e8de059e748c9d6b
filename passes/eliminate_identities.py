"""fold: what computes nothing vanishes: identities, dropout in eval mode, and whatever does not lead to the output."""

from __future__ import annotations

from torch import fx, nn

from fxcurv.ir.rewriting import rewrites

__all__ = ["drop_identity", "fold"]


def fold(gm: fx.GraphModule) -> fx.GraphModule:
    """The canonical graph without nodes that compute nothing or lead nowhere."""
    return rewrites(gm, drop_identity)


def drop_identity(node: fx.Node, op: nn.Module) -> fx.Node | None:
    """Identity(x), and Dropout(x) in eval mode, are x."""
    if isinstance(op, nn.Identity) or (isinstance(op, nn.Dropout) and not op.training):
        (x,) = node.all_input_nodes
        return x
    return None
