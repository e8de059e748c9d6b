"""concatenate: cotangents of the parts of a tensor are concatenated, where the parts tile it.

By definition, a tensor split into q, k and v, or into the two halves of a gated unit, receives the sum of tensors that
are zero outside one part's cotangent. Where every entry belongs to exactly one part, the sum is their concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from fxcurv.core.shapes import Shape
from fxcurv.ir import ops
from fxcurv.ir.backward_ops import Accumulate, Joined, Pull
from fxcurv.ir.nodes import module_of
from fxcurv.ir.rewriting import instead, rewrites

__all__ = ["join"]


_Piece = ops.Select | ops.Slice


def join(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without sums of disjoint parts; forward graphs have none."""
    return rewrites(gm, _joined)


def _joined(node: fx.Node, op: nn.Module) -> fx.Node | None:
    """Replace Σ of pullbacks through slices, or selections, that tile an axis by `Joined` along that axis."""
    if not isinstance(op, Accumulate):
        return None
    found = {_start(part): (part, pull.args[0]) for pull in node.all_input_nodes if (part := _part(pull)) is not None}
    if len(found) < len(node.args):
        return None
    parts, Ss = zip(*(found[start] for start in sorted(found)), strict=True)
    shape: Shape = node.meta["shape"][1:]
    axis = _tiled(parts, shape)
    if axis is None:
        return None
    return instead(node, Joined(axis + 1, new=isinstance(parts[0], ops.Select)), tuple(Ss))


def _part(pull: fx.Node) -> _Piece | None:
    """Return the slice or selection through which a node pulls back."""
    op = module_of(pull) if pull.op == "call_module" else None
    return op.op if isinstance(op, Pull) and not op.per_sample and isinstance(op.op, _Piece) else None


def _start(part: _Piece) -> int:
    return part.index if isinstance(part, ops.Select) else part.start


def _tiled(parts: Sequence[_Piece], shape: Shape) -> int | None:
    """Return the one axis along which parts, in order, tile a tensor of this shape; None if they do not."""
    axes = {part.dim % len(shape) for part in parts}
    axis = axes.pop()
    if axes or len({type(part) for part in parts}) > 1 or not isinstance(shape[axis], int):
        return None
    ends = [0, *(_start(part) + 1 if isinstance(part, ops.Select) else part.stop for part in parts)]
    whole = all(isinstance(part, ops.Select) or part.step == 1 for part in parts)
    adjacent = [_start(part) for part in parts] == ends[:-1]
    return axis if whole and adjacent and ends[-1] == shape[axis] else None
