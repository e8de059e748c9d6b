"""scales: the scale of an eval-mode BatchNorm behind a convolution becomes part of the convolution's pullback.

Instead of every column at every position, the weight that pulls it back is scaled, and the sums of what arrives.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxcurv import ops
from fxcurv.contractions import Statistic
from fxcurv.pullback import OutputPositions, Pull, PullScaled, Scaled
from fxcurv.spec import module_of
from passes.rewrite import copied, settled

__all__ = ["fold_scales"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def fold_scales(gm: fx.GraphModule) -> fx.GraphModule:
    """A backward graph in which no column is multiplied by a scale whose convolution can take it."""
    gm = copied(gm)
    for node in list(gm.graph.nodes):
        op = module_of(node) if node.op == "call_module" else None
        if isinstance(op, Pull) and isinstance(op.op, ops.Affine) and not op.per_sample:
            readers = _readers(node)
            if readers is not None:
                _fold(gm, node, op.op, readers)
    return settled(gm)


def _readers(scaled: fx.Node) -> list[fx.Node] | None:
    """The pullback and the sums that read scaled columns, if all are of one convolution and can take the scale."""
    readers: list[fx.Node] = []
    convolutions: list[object] = []
    for user in scaled.users:
        op: Any = module_of(user) if user.op == "call_module" else None
        if isinstance(op, OutputPositions):
            readers += user.users
        elif isinstance(op, Pull | Statistic):
            readers.append(user)
        convolutions.append(getattr(op, "op", None))
    one = isinstance(convolutions[0], Conv) and all(op is convolutions[0] for op in convolutions)
    return readers if one and readers and all(map(_takes_a_scale, readers)) else None


def _takes_a_scale(reader: fx.Node) -> bool:
    if reader.op != "call_module":
        return False
    op, Ss = module_of(reader), reader.args[-1]
    if isinstance(op, Statistic):
        return op.scales and isinstance(Ss, list | tuple) and len(Ss) == 1
    return isinstance(op, Pull)


def _fold(gm: fx.GraphModule, scaled: fx.Node, scale: ops.Affine, readers: list[fx.Node]) -> None:
    """Readers that scale by themselves, of the columns as they arrive at the scale."""
    for reader in readers:
        op: Any = module_of(reader)
        taken = Scaled(op, scale) if isinstance(op, Statistic) else PullScaled(op.op, scale)
        gm.set_submodule(str(reader.target), taken)
    scaled.replace_all_uses_with(scaled.all_input_nodes[0])
    gm.graph.erase_node(scaled)
