"""fold_scales: the scale of an eval-mode BatchNorm after a convolution is folded into the convolution's pullback.

Instead of every column at every position, the weight of the pullback and the sums of unscaled columns are scaled,
where these have fewer entries.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn

from fxcurv.contractions.statistic import Statistic
from fxcurv.ir import ops
from fxcurv.ir.backward_ops import OutputPositions, Pull, PullScaled, Scaled
from fxcurv.ir.nodes import module_of
from fxcurv.ir.rewriting import copied, settled
from passes.select_algorithms import Setting

__all__ = ["fold_scales"]


Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def fold_scales(gm: fx.GraphModule, setting: Setting) -> fx.GraphModule:
    """Return a backward graph where convolutions apply the scale of their columns, wherever that costs less."""
    gm = copied(gm)
    for node in list(gm.graph.nodes):
        op = module_of(node) if node.op == "call_module" else None
        if isinstance(op, Pull) and isinstance(op.op, ops.Affine) and not op.per_sample:
            found = _readers(node)
            if found is not None and _entries(*found) < math.prod(setting.sizes(node)):
                _fold(gm, node, op.op, found[0])
    return settled(gm)


def _readers(scaled: fx.Node) -> tuple[list[fx.Node], nn.Module] | None:
    """Return the pullback and the sums that read scaled columns, with their one convolution, if all can scale."""
    readers: list[fx.Node] = []
    convolutions: list[Any] = []
    for user in scaled.users:
        op: Any = module_of(user) if user.op == "call_module" else None
        if isinstance(op, OutputPositions):
            readers += user.users
        elif isinstance(op, Pull | Statistic):
            readers.append(user)
        convolutions.append(getattr(op, "op", None))
    first, *others = convolutions
    one = isinstance(first, Conv) and all(op is first for op in others)
    return (readers, first) if one and readers and all(map(_takes_a_scale, readers)) else None


def _takes_a_scale(reader: fx.Node) -> bool:
    if reader.op != "call_module":
        return False
    op, Ss = module_of(reader), reader.args[-1]
    if isinstance(op, Statistic):
        return op.scales and isinstance(Ss, list | tuple) and len(Ss) == 1
    return isinstance(op, Pull)


def _entries(readers: list[fx.Node], convolution: nn.Module) -> int:
    """Count the multiplied entries if the readers scale: weights, and sums of their size or of pairs of outputs."""
    weight: Any = convolution.weight
    ops: list[Any] = [module_of(reader) for reader in readers]
    return sum(len(weight) ** 2 if isinstance(op, Statistic) and op.reads == "S" else weight.numel() for op in ops)


def _fold(gm: fx.GraphModule, scaled: fx.Node, scale: ops.Affine, readers: list[fx.Node]) -> None:
    """Replace the readers by readers that scale, applied to the columns before the scale."""
    for reader in readers:
        op: Any = module_of(reader)
        taken = Scaled(op, scale) if isinstance(op, Statistic) else PullScaled(op.op, scale)
        gm.set_submodule(str(reader.target), taken)
    scaled.replace_all_uses_with(scaled.all_input_nodes[0])
    gm.graph.erase_node(scaled)
