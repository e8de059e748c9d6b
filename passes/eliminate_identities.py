"""eliminate_identities: remove identities, dropout in eval mode, and nodes that do not reach the output."""

from __future__ import annotations

from torch import fx, nn

from fxcurv.ir.rewriting import rewrites

__all__ = ["drop_identity", "fold"]


def fold(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the canonical graph without identities and nodes that do not reach the output."""
    return rewrites(gm, drop_identity)


def drop_identity(node: fx.Node, op: nn.Module) -> fx.Node | None:
    """Replace Identity(x), and Dropout(x) in eval mode, by x."""
    if isinstance(op, nn.Identity) or (isinstance(op, nn.Dropout) and not op.training):
        (x,) = node.all_input_nodes
        return x
    return None
